"""Plan: from expert ids and a placement to integers that say which row goes where.

    tokens -> router -> [plan] -> dispatch -> experts -> combine

The plan holds no activations and no gradients. It is made once per forward pass and read by dispatch and combine, and
again by their backwards. A token goes to a rank once, however many of its experts live there.

Shape letters as in ops.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.placement import Cut, Placement
from ep_engine.transport import Link


@dataclass(frozen=True)
class Site:
    """One layer's part of a placement, seen from one rank of its expert-parallel group."""

    cut: Cut
    rank: int
    slot_of_expert: list[int]  # [E], in [0, P * slots_per_rank)
    one_row_per_copy: bool = False  # send a row per copy and sum at the token's home, in the order of expert ids
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, placement: Placement, layer: int, cut: Cut, rank: int, *, one_row_per_copy: bool = False) -> "Site":
        """The site of `layer` on `rank` of a group that cuts the placement's tree."""
        return cls(cut, rank, placement.slot_of_expert(layer), one_row_per_copy)

    @property
    def slots_per_rank(self) -> int:
        """L, expert slots of this rank."""
        return self.cut.slots_per_rank

    def slot_table(self, device: torch.device) -> Tensor:
        """slot_of_expert as int32 on a device; made once, because a copy to a GPU would wait for it."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.slot_of_expert, dtype=torch.int32, device=device)
        return self._tables[device]

    def experts_here(self) -> list[int]:
        """[L]: the logical expert in every slot of this rank, -1 for an empty one."""
        first = self.rank * self.slots_per_rank
        held = {slot - first: expert for expert, slot in enumerate(self.slot_of_expert)}
        return [held.get(slot, -1) for slot in range(self.slots_per_rank)]


@dataclass(frozen=True)
class Plan:
    """Where the rows of one forward pass go; what must be known on the host is in the lists."""

    site: Site
    num_tokens: int
    top_k: int
    row_token_S: Tensor  # (S,) token of each row
    row_choice_SW: Tensor  # (S, W) which of the token's choices a row is for, -1: none
    row_slot_SW: Tensor  # (S, W) the local slots of those choices on the row's rank, ascending, -1: none
    visit_row_TC: Tensor  # (T, C) a token's rows, -1: none
    visit_rank_TC: Tensor  # (T, C) and their ranks, ascending
    rows_from_rank_P: Tensor  # (P,) int32
    send_rows: list[int]  # [P] rows to every rank, own rank included
    recv_rows: list[int]  # [P] rows from every rank


def make_plan(ids_TK: Tensor, site: Site, link: Link) -> Plan:
    """Plan the dispatch of this rank's tokens, tell the other ranks the counts, and write the rows into the ledger.

    Reads the counts on the host, which waits for the device.

    Args:
        ids_TK: int64 logical expert ids, distinct in a row; T may be 0 and may differ between ranks.
        site: where the experts of this layer live.
        link: this layer's end of the transport.
    """
    num_tokens, top_k = ids_TK.shape
    slot_of_expert_E = site.slot_table(ids_TK.device)
    sent = ops.plan_send(
        ids_TK,
        slot_of_expert_E,
        num_ranks=site.cut.ep_size,
        slots_per_rank=site.slots_per_rank,
        own_rank=site.rank,
        one_row_per_copy=site.one_row_per_copy,
    )
    rows_from_rank_P = link.exchange_counts(sent.rows_per_rank_P)
    other_P = _rows_of_other_protocol(ids_TK, slot_of_expert_E, site)
    send_rows, recv_rows, other = torch.stack((sent.rows_per_rank_P, rows_from_rank_P, other_P)).tolist()
    plain, dedup = (send_rows, other) if site.one_row_per_copy else (other, send_rows)
    link.ledger.record_rows(link.layer, num_tokens, sent=send_rows, plain=plain, dedup=dedup)
    num_rows = sum(send_rows)
    return Plan(
        site=site,
        num_tokens=num_tokens,
        top_k=top_k,
        row_token_S=sent.row_token_S[:num_rows],
        row_choice_SW=sent.row_choice_SW[:num_rows],
        row_slot_SW=sent.row_slot_SW[:num_rows],
        visit_row_TC=sent.visit_row_TC,
        visit_rank_TC=sent.visit_rank_TC,
        rows_from_rank_P=rows_from_rank_P,
        send_rows=send_rows,
        recv_rows=recv_rows,
    )


def _rows_of_other_protocol(ids_TK: Tensor, slot_of_expert_E: Tensor, site: Site) -> Tensor:
    """Rows to every rank, (P,) int32, under the protocol that is not in use: per token and rank, or per copy."""
    rank_TK = (slot_of_expert_E[ids_TK] // site.slots_per_rank).long()
    if not site.one_row_per_copy:
        ranks_N = rank_TK.reshape(-1)
        rows_P = torch.zeros(site.cut.ep_size, dtype=torch.int32, device=ids_TK.device)
        return rows_P.scatter_add_(0, ranks_N, torch.ones_like(ranks_N, dtype=torch.int32))
    visited_TP = torch.zeros(len(ids_TK), site.cut.ep_size, dtype=torch.bool, device=ids_TK.device)
    return visited_TP.scatter_(1, rank_TK, True).sum(dim=0, dtype=torch.int32)
