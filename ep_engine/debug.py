"""Checks that cost time and so wait to be asked for with EP_DEBUG=1 in the environment, which only this file reads."""

import os

import torch
from torch import Tensor

from ep_engine.errors import Fault


def wanted() -> bool:
    """Whether EP_DEBUG is set to something but 0."""
    return os.environ.get("EP_DEBUG", "0") not in ("", "0")


def check_ids(ids_TK: Tensor, num_ids: int, where: str) -> None:
    """Fault unless ids are in -1..num_ids-1 and distinct within a token; reads one flag of each on the host."""
    outside = ((ids_TK < -1) | (ids_TK >= num_ids)).any(dim=1)
    sorted_TK = ids_TK.sort(dim=1).values
    twice = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any(dim=1)
    for wrong_T, words in ((outside, f"names an expert outside 0..{num_ids - 1}"), (twice, "names an expert twice")):
        if wrong_T.any():
            token = int(wrong_T.nonzero()[0, 0])
            raise Fault(f"{where}: token {token} {words}: {ids_TK[token].tolist()}")


def check_slots(row_slot_RW: Tensor, num_slots: int, where: str, *, may_be_empty: bool = False) -> None:
    """Fault unless every arrived row names slots, at least one or `may_be_empty`, ascending and in range, then -1."""
    before_RW = torch.nn.functional.pad(row_slot_RW, (1, 0), value=-1)[:, :-1]
    used = row_slot_RW >= 0
    good = torch.where(used, (row_slot_RW > before_RW) & (row_slot_RW < num_slots), row_slot_RW == -1)
    used_before = torch.nn.functional.pad(used, (1, 0), value=True)[:, :-1]
    wrong_R = ~(good & (used_before | ~used)).all(dim=1)
    if not may_be_empty:
        wrong_R |= ~used[:, 0]
    if wrong_R.any():
        row = int(wrong_R.nonzero()[0, 0])
        raise Fault(f"{where}: arrived row {row} names slots {row_slot_RW[row].tolist()} of {num_slots}")
