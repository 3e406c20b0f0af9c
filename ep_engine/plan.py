"""Plan: from expert ids and a placement to integers that say which row goes where.

    tokens -> router -> [plan] -> dispatch -> experts -> combine

The plan holds no activations and no gradients. It is made once per forward pass and read by dispatch and combine, and
again by their backwards. A token goes to a rank once, however many of its experts live there.

A way to the experts is one hop over all ranks, or one over nodes and one inside the node: then a token's row goes to a
node once, to the rank there that has the place of its home rank, and from there to the ranks of its experts.

Shape letters as in ops.py; H hops.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_engine import debug, ops
from ep_engine.errors import Fault
from ep_engine.placement import Cut, Placement
from ep_engine.stopwatch import timed
from ep_engine.transports.transport import Link


@dataclass(frozen=True)
class Site:
    """One layer's part of a placement, seen from one rank of its expert-parallel group.

    An expert may be split along its hidden width into parts on neighbouring ranks, whose outputs add up: then a part is
    what is chosen, planned and dispatched, and its id is expert * parts + part.
    """

    cut: Cut
    rank: int
    slot_of_expert: list[int]  # [E * parts], in [0, P * slots_per_rank)
    one_row_per_copy: bool = False  # send a row per copy and sum at the token's home, in the order of expert ids
    parts: int = 1

    @classmethod
    def of(
        cls,
        placement: Placement,
        layer: int,
        ep_size: int,
        rank: int,
        *,
        one_row_per_copy: bool = False,
        parts: int = 1,
    ) -> "Site":
        """The site of `layer` on `rank` of a group that cuts the placement's tree, each cut shared by `parts` ranks."""
        cut = placement.cut(ep_size, layer)
        slots, per_rank = placement.slot_of_expert(layer), cut.slots_per_rank
        of_part = [(s // per_rank * parts + part) * per_rank + s % per_rank for s in slots for part in range(parts)]
        return cls(cut.in_parts(parts), rank, of_part, one_row_per_copy, parts)

    @property
    def slots_per_rank(self) -> int:
        """L, expert slots of this rank."""
        return self.cut.slots_per_rank

    def experts_here(self) -> list[int]:
        """[L]: the logical expert in every slot of this rank, -1 for an empty one."""
        first = self.rank * self.slots_per_rank
        held = {slot - first: part // self.parts for part, slot in enumerate(self.slot_of_expert)}
        return [held.get(slot, -1) for slot in range(self.slots_per_rank)]

    def in_parts(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Choices of experts -> choices of all their parts, (T, K * parts), each with the weight of its expert."""
        if self.parts == 1:
            return ids_TK, weights_TK
        part_ids = ids_TK.unsqueeze(2) * self.parts + torch.arange(self.parts, device=ids_TK.device)
        part_ids = part_ids.masked_fill(ids_TK.unsqueeze(2) < 0, -1)
        return part_ids.flatten(1), weights_TK.repeat_interleave(self.parts, dim=1)


@dataclass(frozen=True)
class Hop:
    """One exchange on the way from a token to its experts."""

    link: Link
    slots_per_rank: int  # slots behind one rank of the link
    slot_of_id: list[int]  # where what a token names lies: an expert's slot, or a slot of the node itself
    one_row_per_copy: bool
    sum_sizes: list[int]  # group sizes, in ranks of the link, of the sum of a token's rows at their home
    run_order: list[int]  # runs of arrived rows in the order of the global tokens
    agreement: int = 0  # what all ranks must have in common, as a number
    fixed_rows: int | None = None  # rows to every other rank, the rest of them empty: no counts are read on the host
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _agreed: set[int] = field(default_factory=set, init=False, repr=False, compare=False)  # on these top_k

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """slot_of_id and run_order as int32 on a device; made once, because a copy to a GPU would wait for it."""
        if device not in self._tables:
            slot, order = (
                torch.tensor(table, dtype=torch.int32, device=device) for table in (self.slot_of_id, self.run_order)
            )
            self._tables[device] = slot, order
        return self._tables[device]


def way_to(site: Site, links: Sequence[Link], fixed_rows: int | None = None) -> tuple[Hop, ...]:
    """The hops from this rank to the experts: over one link, or over the nodes and then inside the node."""
    assert fixed_rows is None or len(links) == 1, "rows that arrive on a node are not counted beforehand"
    first = links[0]
    num_nodes = first.transport.size
    per_node = site.cut.ep_size // num_nodes
    over_nodes = Hop(
        link=first,
        slots_per_rank=site.slots_per_rank * per_node,
        slot_of_id=site.slot_of_expert,
        one_row_per_copy=site.one_row_per_copy,
        sum_sizes=[size // per_node for size in site.cut.group_sizes_of_ranks if size > per_node] or [1],
        run_order=_own_last(num_nodes, first.transport.rank),
        agreement=_agreement(site, links, fixed_rows),
        fixed_rows=fixed_rows,
    )
    if len(links) == 1:
        return (over_nodes,)
    inside = links[1]
    # Memory holds, for each rank of the node (the own one last), its rows from each node (the own one last).
    ranks, nodes = (_in_memory(link.transport.size, link.transport.rank) for link in (inside, first))
    homes = [node * per_node + rank for rank in ranks for node in nodes]
    inside_node = Hop(
        link=inside,
        slots_per_rank=site.slots_per_rank,
        slot_of_id=list(range(site.slots_per_rank * per_node)),
        one_row_per_copy=False,
        sum_sizes=[size for size in site.cut.group_sizes_of_ranks if size <= per_node] or [1],
        run_order=sorted(range(len(homes)), key=lambda run: homes[run]),
        agreement=_agreement(site, links, None),
    )
    return over_nodes, inside_node


def _agreement(site: Site, links: Sequence[Link], fixed_rows: int | None) -> int:
    """What the ranks must have in common, in 31 bits."""
    sizes = [link.transport.size for link in links]
    common = (links[0].layer, site.cut, site.slot_of_expert, site.one_row_per_copy, sizes, fixed_rows)
    return zlib.crc32(repr(common).encode()) >> 1


def _in_memory(size: int, own: int) -> list[int]:
    return [rank for rank in range(size) if rank != own] + [own]


def _own_last(size: int, own: int) -> list[int]:
    """Position in memory of every rank's rows."""
    return sorted(range(size), key=lambda run: _in_memory(size, own)[run])


@dataclass(frozen=True)
class Plan:
    """Where the rows of one forward pass go on one hop; what must be known on the host is in the lists."""

    hop: Hop
    num_tokens: int
    top_k: int
    row_token_S: Tensor  # (S,) token of each row
    row_choice_SW: Tensor  # (S, W) which of all T * K choices a row is for, -1: none
    row_slot_SW: Tensor  # (S, W) the local slots of those choices on the row's rank, ascending, -1: none
    visit_row_TC: Tensor  # (T, C) a token's rows, -1: none
    visit_rank_TC: Tensor  # (T, C) and their ranks, ascending
    rows_of_run: Tensor  # (P * runs,) int32 rows that arrive, by run
    send_rows: list[int]  # [P] rows to every rank, own rank included
    recv_rows: list[int]  # [P] rows from every rank


@timed("dispatch")
def make_plan(
    ids_TK: Tensor, hop: Hop, run_of_token_T: Tensor | None = None, num_runs: int = 1, *, may_lack: bool = False
) -> Plan:
    """Plan one hop of this rank's tokens and tell the other ranks the counts.

    Reads the counts on the host, which waits for the device; not so where there is no other rank, or with fixed rows.

    Raises:
        Fault: another rank has another placement, rule of rows or top_k for this layer, or a peer is lost; or a rank
            gets more than the fixed rows (on a GPU an assertion of the device says so).

    Args:
        ids_TK: int64 ids that `hop.slot_of_id` knows, distinct in a row, -1 for none; T may be 0 and may differ
            between ranks.
        hop: where they lie.
        run_of_token_T: int64 in [0, num_runs), ascending: tokens that came from one place. None: all from this rank.
        num_runs: of tokens, the same on all ranks.
        may_lack: whether tokens of this rank may have fewer choices than others.
    """
    num_tokens, top_k = ids_TK.shape
    link, size = hop.link, hop.link.transport.size
    if debug.wanted():
        debug.check_ids(ids_TK, len(hop.slot_of_id), f"layer {link.layer} on rank {link.transport.rank}")
    slot_of_id, _ = hop.tables(ids_TK.device)
    sent = ops.plan_send(
        ids_TK,
        slot_of_id,
        num_ranks=size,
        slots_per_rank=hop.slots_per_rank,
        own_rank=link.transport.rank,
        one_row_per_copy=hop.one_row_per_copy,
    )
    if run_of_token_T is None and (size == 1 or hop.fixed_rows is not None):
        if size > 1 and (top_k not in hop._agreed or debug.wanted()):  # once, because the host waits for it
            _exchange(hop, top_k, sent.rows_per_rank_P.unsqueeze(1))
            hop._agreed.add(top_k)
        sent, send_rows = _with_fixed_rows(sent, hop, may_lack)
        recv_rows, rows_of_run = send_rows, torch.full_like(sent.rows_per_rank_P, hop.fixed_rows or 0)
        rows_of_run[-1] = send_rows[link.transport.rank]
    else:
        counts_PN = sent.rows_per_rank_P.unsqueeze(1)
        if run_of_token_T is not None:
            counts_PN = _count_runs(sent, run_of_token_T, num_runs, link.transport.rank)
        arriving_PN, send_rows, recv_rows = _exchange(hop, top_k, counts_PN)
        rows_of_run = arriving_PN[_in_memory(size, link.transport.rank)].reshape(-1)
    num_rows = sum(send_rows)
    return Plan(
        hop=hop,
        num_tokens=num_tokens,
        top_k=top_k,
        row_token_S=sent.row_token_S[:num_rows],
        row_choice_SW=sent.row_choice_SW[:num_rows],
        row_slot_SW=sent.row_slot_SW[:num_rows],
        visit_row_TC=sent.visit_row_TC,
        visit_rank_TC=sent.visit_rank_TC,
        rows_of_run=rows_of_run,
        send_rows=send_rows,
        recv_rows=recv_rows,
    )


def _exchange(hop: Hop, top_k: int, counts_PN: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Rows from every rank by run (P, N), and on the host the rows to and from every rank."""
    own = torch.full_like(counts_PN[:, :1], hop.agreement ^ top_k)
    arrived_PN = hop.link.exchange_counts(torch.cat((counts_PN, own), dim=1))
    arriving_PN = arrived_PN[:, :-1]
    send_rows, recv_rows, words = torch.stack(
        (counts_PN.sum(dim=1), arriving_PN.sum(dim=1), arrived_PN[:, -1].long())
    ).tolist()
    _check_agreement(words, hop, top_k)
    return arriving_PN, send_rows, recv_rows


def _with_fixed_rows(sent: ops.SendTables, hop: Hop, may_lack: bool) -> tuple[ops.SendTables, list[int]]:
    """The same rows, those of a rank beginning where they would if every rank got as many; and how many each gets."""
    size, own = hop.link.transport.size, hop.link.transport.rank
    num_tokens, columns = sent.visit_row_TC.shape
    own_rows = num_tokens * (columns if hop.one_row_per_copy else 1)
    if size == 1:
        return _with_gaps(sent, own_rows, hop.one_row_per_copy) if may_lack else sent, [own_rows]
    assert hop.fixed_rows is not None, "the caller has asked"
    away_P = sent.rows_per_rank_P.clone()
    away_P[own] = 0
    _check_room(away_P, hop.fixed_rows, hop.link)
    rank_P = torch.arange(size, device=away_P.device)
    shift_P = (rank_P - (rank_P > own).long()) * hop.fixed_rows - (away_P.cumsum(0) - away_P)
    shift_P[own] = (size - 1) * hop.fixed_rows - away_P.sum()
    total = (size - 1) * hop.fixed_rows + own_rows
    # What no row is left for goes behind the last: the check has failed then, on a GPU it may not have been heard yet.
    there = sent.visit_row_TC >= 0
    moved_TC = (sent.visit_row_TC + shift_P[sent.visit_rank_TC.clamp(min=0).long()]).clamp(max=total)
    target = torch.where(there, moved_TC, total).reshape(-1)
    source = sent.visit_row_TC.clamp(min=0).reshape(-1)

    def moved(table: Tensor) -> Tensor:
        return table.new_full((total + 1, *table.shape[1:]), -1).index_copy_(0, target, table[source])[:total]

    fixed = sent._replace(
        row_token_S=moved(sent.row_token_S),
        row_slot_SW=moved(sent.row_slot_SW),
        row_choice_SW=moved(sent.row_choice_SW),
        visit_row_TC=torch.where(there, moved_TC, -1).int(),
    )
    return fixed, [own_rows if p == own else hop.fixed_rows for p in range(size)]


def _with_gaps(sent: ops.SendTables, total: int, one_row_per_copy: bool) -> ops.SendTables:
    """The rows of the only rank: as many as if no token lacked a choice, and a token's row in the token's place."""
    visit_row_TC = sent.visit_row_TC
    there = visit_row_TC >= 0
    place_TC = visit_row_TC.long()
    if not one_row_per_copy:
        place_TC = torch.arange(total, device=place_TC.device)[:, None]
    target = torch.where(there, place_TC, total).reshape(-1)
    source = visit_row_TC.clamp(min=0).reshape(-1)

    def moved(table: Tensor) -> Tensor:
        return table.new_full((total + 1, *table.shape[1:]), -1).index_copy_(0, target, table[source])[:total]

    return sent._replace(
        row_token_S=moved(sent.row_token_S),
        row_slot_SW=moved(sent.row_slot_SW),
        row_choice_SW=moved(sent.row_choice_SW),
        visit_row_TC=torch.where(there, place_TC, -1).int(),
    )


def _check_room(away_P: Tensor, limit: int, link: Link) -> None:
    if away_P.is_cuda:
        torch._assert_async((away_P <= limit).all(), f"layer {link.layer}: more rows for a rank than moe.fixed_rows")
        return
    most = int(away_P.max())
    if most > limit:
        raise Fault(
            f"rank {link.transport.rank} of {link.transport.size} in group ep: layer {link.layer} has {most} rows for "
            f"rank {int(away_P.argmax())}, moe.fixed_rows is {limit}; raise it, or leave it out"
        )


def _check_agreement(words: list[int], hop: Hop, top_k: int) -> None:
    """Whether all ranks plan the same layer in the same way: otherwise rows would go astray."""
    link = hop.link
    other = [rank for rank, word in enumerate(words) if word != hop.agreement ^ top_k]
    if other:
        raise Fault(
            f"rank {link.transport.rank} of {link.transport.size} in group ep: layer {link.layer} is planned otherwise "
            f"on rank {other[0]}; give all ranks the same model, placement and moe.combine"
        )


def _count_runs(sent: ops.SendTables, run_of_token_T: Tensor, num_runs: int, own_rank: int) -> Tensor:
    """Rows to every rank by the run their token is of, (P, N) int32."""
    size = len(sent.rows_per_rank_P)
    rank_S = torch.tensor(_in_memory(size, own_rank), device=run_of_token_T.device).repeat_interleave(
        sent.rows_per_rank_P[_in_memory(size, own_rank)].long()
    )
    run_S = run_of_token_T[sent.row_token_S[: len(rank_S)].long()]
    return torch.bincount(rank_S * num_runs + run_S, minlength=size * num_runs).view(size, num_runs).int()


def record(ids_TK: Tensor, site: Site, plans: Sequence[Plan]) -> None:
    """Write the rows of a forward pass into the ledger, beside what two other protocols would have sent.

    One row per copy is `plain`, one row per token and rank `dedup`. On several hops a row that stays on its node is
    counted where it goes next.
    """
    link = plans[0].hop.link
    ledger, num_ranks = link.ledger, site.cut.ep_size
    slot_of_id, _ = plans[0].hop.tables(ids_TK.device)
    rank_TK = (slot_of_id[ids_TK] // site.slots_per_rank).long()  # of a choice that is dropped any
    copies_TP = ids_TK.new_zeros(len(ids_TK), num_ranks).scatter_add_(1, rank_TK, (ids_TK >= 0).long())
    ledger.record_rows(link.layer, len(ids_TK), plain=copies_TP.sum(dim=0), dedup=(copies_TP > 0).sum(dim=0))
    for plan in plans:
        own = plan.hop.link.transport.rank
        going_on = plan is not plans[-1]
        sent = [0 if going_on and p == own else n for p, n in enumerate(plan.send_rows)]
        ledger.record_rows(link.layer, 0, plan.hop.link.tiers, sent=sent)
