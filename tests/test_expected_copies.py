"""Rows that leave a rank under uniform routing: our formula, the table of the C2R specification, and the planning op.

A token's rank is any, and independent of its experts. `plain` sends a row per expert, `dedup` one per rank, and tokens
limited to as few ranks as can hold K experts need exactly so many.
"""

import math

import pytest
import torch

from ep_engine import ops
from ep_engine.c2r.locality import uniform_layer
from ep_engine.placement import Placement
from ep_engine.selection import GroupLimited

TOKENS = 8_000
RANKS = (2, 4, 8, 16)
# Remote rows of a token with one row per rank, by (E, K): on 2, 4, 8 and 16 ranks.
DEDUP: dict[tuple[int, int], tuple[float, ...]] = {
    (8, 2): (0.786, 1.393, 1.750),
    (8, 4): (0.986, 2.357, 3.500),
    (8, 6): (1.000, 2.893, 5.250),
    (8, 8): (1.000, 3.000, 7.000),
    (16, 2): (0.767, 1.350, 1.692, 1.875),
    (16, 4): (0.962, 2.184, 3.150, 3.750),
    (16, 6): (0.997, 2.654, 4.375, 5.625),
    (16, 8): (1.000, 2.885, 5.367, 7.500),
    (60, 2): (0.754, 1.322, 1.653, 1.831),
    (60, 4): (0.944, 2.083, 2.955, 3.489),
    (60, 6): (0.988, 2.512, 3.972, 4.986),
    (60, 8): (0.998, 2.747, 4.758, 6.332),
    (64, 2): (0.754, 1.321, 1.653, 1.830),
    (64, 4): (0.943, 2.081, 2.954, 3.488),
    (64, 6): (0.988, 2.509, 3.969, 4.984),
    (64, 8): (0.998, 2.744, 4.753, 6.329),
    (128, 2): (0.752, 1.317, 1.647, 1.823),
    (128, 4): (0.940, 2.066, 2.925, 3.450),
    (128, 6): (0.986, 2.487, 3.912, 4.898),
    (128, 8): (0.997, 2.722, 4.672, 6.184),
    (256, 2): (0.751, 1.315, 1.644, 1.820),
    (256, 4): (0.939, 2.058, 2.911, 3.431),
    (256, 6): (0.985, 2.477, 3.885, 4.856),
    (256, 8): (0.997, 2.711, 4.633, 6.116),
}


@pytest.mark.parametrize(("num_experts", "top_k"), DEDUP, ids=str)
def test_rows_that_the_plan_sends_are_those_of_the_formula(num_experts: int, top_k: int) -> None:
    scores_TE = torch.rand(TOKENS, num_experts, generator=torch.Generator().manual_seed(0))
    ids_TK = scores_TE.topk(top_k, dim=1).indices
    for ranks, of_table in zip(RANKS, DEDUP[num_experts, top_k], strict=False):
        remote = 1 - 1 / ranks
        formula = uniform_layer(num_experts, top_k, ranks)["remote_copies"]
        assert formula == pytest.approx(of_table, abs=0.0006)
        assert remote_rows(ids_TK, num_experts, ranks, per_copy=True) == pytest.approx(top_k * remote, rel=0.01)
        assert remote_rows(ids_TK, num_experts, ranks, per_copy=False) == pytest.approx(formula, rel=0.01)
        if num_experts % ranks == 0:
            fewest = math.ceil(top_k * ranks / num_experts)
            limited_TK = GroupLimited(top_k, num_experts, ranks, fewest).select(scores_TE)
            assert remote_rows(limited_TK, num_experts, ranks, per_copy=False) == pytest.approx(fewest * remote)


def remote_rows(ids_TK: torch.Tensor, num_experts: int, ranks: int, *, per_copy: bool) -> float:
    """Rows of a token that leave a rank, on average over all ranks that it may be on."""
    placement = Placement.contiguous(num_experts, ranks, 1)
    slot_of_id = torch.tensor(placement.slot_of_expert(0), dtype=torch.int32)
    left = 0
    for own in range(ranks):
        sent = ops.plan_send(
            ids_TK,
            slot_of_id,
            num_ranks=ranks,
            slots_per_rank=placement.slots_per_device(0),
            own_rank=own,
            one_row_per_copy=per_copy,
        )
        rows = sent.rows_per_rank_P
        left += int(rows.sum() - rows[own])
    return left / (ranks * len(ids_TK))
