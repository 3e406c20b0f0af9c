"""Expert traffic: what the ledgers of all ranks will say about a step, from the experts of its tokens.

A rank's rows are planned by the op that plans them in a run; who sends how many to whom is then arithmetic, and no
message moves.

Shape letters as in ops.py; L MoE layers, N tokens of a step on all ranks.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.capacity import Capacity
from ep_engine.config import RunConfig
from ep_engine.dispatch import quantised_row
from ep_engine.errors import UserError
from ep_engine.ledger import Ledger
from ep_engine.mesh import grids, rank_groups
from ep_engine.message import Message
from ep_engine.model_config import ModelConfig
from ep_engine.placement import Placement
from ep_engine.plan import Hop, Site, way_to
from ep_engine.stages import Stages
from ep_engine.transports.transport import Alone, Link


class _Seat(Alone):
    """A place in a group that nothing is sent through."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@dataclass(frozen=True)
class Groups:
    """The ranks of a job, as `mesh.py` groups them."""

    axes: dict[str, list[list[int]]]
    node_of_rank: list[int]

    @classmethod
    def of(cls, config: RunConfig, world_size: int, ranks_per_node: int) -> "Groups":
        """Those of a run; ranks of a node have consecutive numbers."""
        parallel = config.parallel
        nodes = [rank // ranks_per_node for rank in range(world_size)]
        dense, experts = grids(
            world_size,
            parallel.expert_parallel_size,
            tp_size=parallel.tensor_parallel_size,
            etp_size=parallel.expert_tensor_parallel_size,
            pp_size=parallel.pipeline_parallel_size,
        )
        return cls(rank_groups(dense, experts, nodes), nodes)

    def around(self, rank: int, axis: str) -> list[int]:
        """The ranks of this rank's group; [] where it has none."""
        return next((group for group in self.axes.get(axis, []) if rank in group), [])

    def tier(self, rank: int, other: int) -> str:
        """Link tier from one rank to another."""
        node = self.node_of_rank
        return "self" if rank == other else "node" if node[rank] == node[other] else "network"

    def own_tokens(self, config: RunConfig, rank: int, x_LNK: Tensor) -> Tensor:
        """Of all tokens of a step those that a rank routes, (L, parts, T, K): its rows, its share of their sequence.

        Where there are fewer, they are repeated.
        """
        dp, tp = self.around(rank, "dp"), self.around(rank, "tp")
        parts, length = config.train.micro_batches, config.data.sequence_length
        rows, share = config.data.batch_size // parts // len(dp), length // len(tp)
        row = (torch.arange(parts)[:, None] * len(dp) + dp.index(rank)) * rows + torch.arange(rows)
        numbers = row[:, :, None] * length + tp.index(rank) * share + torch.arange(share)
        return x_LNK[:, numbers.flatten(1) % x_LNK.shape[1]]

    def some(self, most_ranks: int) -> "Groups":
        """The same with only the first dispatch groups of every pipeline stage, of about so many ranks or one group."""
        of_stage: dict[int, list[list[int]]] = {}
        for group in self.axes["dispatch"]:
            chosen = of_stage.setdefault(self.around(group[0], "pp").index(group[0]), [])
            if not chosen or (len(chosen) + 1) * len(group) <= most_ranks:
                chosen.append(group)
        return replace(self, axes={**self.axes, "dispatch": [*chain(*of_stage.values())]})

    def counted(self) -> list[int]:
        """The ranks of its dispatch groups, ascending."""
        return sorted(rank for group in self.axes["dispatch"] for rank in group)


@dataclass(frozen=True)
class Passed:
    """What came to a rank in one pass of a layer."""

    rows: int  # that its experts work on, empty ones too
    copies: int  # of its experts
    sent: int  # rows to other ranks, over all hops
    width: int  # slots that a row can name


@dataclass
class ExpertTraffic:
    """Of one step.

    Attributes:
        ledgers: of every rank that was counted.
        passed: by (rank, layer, part).
    """

    ledgers: dict[int, Ledger]
    passed: dict[tuple[int, int, int], Passed] = field(default_factory=dict)

    def times(self, factor: int) -> "ExpertTraffic":
        """The same of as many times the tokens."""
        ledgers = {}
        for rank, ledger in self.ledgers.items():
            sent = Counter({key: num_bytes * factor for key, num_bytes in ledger.sent.items()})
            tokens = Counter({layer: count * factor for layer, count in ledger.tokens.items()})
            ledgers[rank] = replace(ledger, sent=sent, tokens=tokens)
        passed = {
            key: Passed(one.rows * factor, one.copies * factor, one.sent * factor, one.width)
            for key, one in self.passed.items()
        }
        return ExpertTraffic(ledgers, passed)


def thin(config: RunConfig, tokens: int, most: int) -> tuple[RunConfig, int]:
    """The run with shorter sequences, so that at most `most` of the tokens that are to be counted are left.

    Returns:
        It, and how many tokens one stands for. A large step would take minutes to count.
    """
    positions = config.data.sequence_length // config.parallel.tensor_parallel_size
    if config.moe.fixed_rows is not None:  # what is fixed does not grow with the tokens
        return config, 1
    factors = (f for f in range(1, positions + 1) if positions % f == 0)
    factor = next((f for f in factors if tokens // f <= most), positions)
    length = config.data.sequence_length // factor
    return config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": length})}), factor


def transport_of(config: RunConfig, groups: Groups, placement: Placement) -> str:
    """The transport that `connect.py` will take; `none` where a rank holds all experts."""
    parallel, wanted = config.parallel, config.moe.transport
    dispatch = groups.axes["dispatch"]
    if len(dispatch[0]) == 1:
        return "none"
    if wanted != "auto":
        return wanted
    one_node = all(groups.tier(group[0], rank) != "network" for group in dispatch for rank in group)
    if parallel.device != "cuda" and one_node:
        return "shared_memory"
    cut = placement.cut(parallel.expert_parallel_size).in_parts(parallel.expert_tensor_parallel_size)
    inside = groups.around(0, "ep_inside")
    is_cut = bool(inside) and len(inside) in (1, *cut.group_sizes_of_ranks)
    return "hierarchical" if is_cut and config.moe.fixed_rows is None else "collective"


def count_traffic(
    config: RunConfig, stages: Stages, placement: Placement, groups: Groups, ids_LNK: Tensor, model: ModelConfig
) -> ExpertTraffic:
    """Count the rows and bytes of a step.

    Args:
        config: of the run.
        stages: of its pipeline.
        placement: of its experts.
        groups: of its ranks; those of `dispatch` are counted.
        ids_LNK: experts of the tokens of one step, in the order of routing_trace.py; repeated if they are fewer.
        model: that is trained.

    Raises:
        UserError: a rank would get more rows than moe.fixed_rows.
    """
    ranks = groups.counted()
    tiers = {rank: [groups.tier(rank, other) for other in groups.around(rank, "dispatch")] for rank in ranks}
    found = ExpertTraffic({rank: Ledger(of_rank) for rank, of_rank in tiers.items()})
    axes = ["ep_across", "ep_inside"] if transport_of(config, groups, placement) == "hierarchical" else ["dispatch"]
    for group in groups.axes["dispatch"]:
        here = stages.on(groups.around(group[0], "pp").index(group[0]))
        for layer in (layer for stage in here for layer in stages.layers[stage] if model.moe_of(layer) is not None):
            n = model.moe_index(layer)
            ids_of_rank = _served(config, groups, group, ids_LNK[n : n + 1], model.experts_of_layer()[n])
            ways = {rank: _way(config, placement, groups, axes, rank, n, found.ledgers[rank], layer) for rank in group}
            for part in range(config.train.micro_batches):
                given = {rank: ids_of_rank[rank][part] for rank in group}
                for rank, passed in _pass(config, groups, axes, ways, given, model.hidden_size).items():
                    found.passed[rank, layer, part] = passed
    return found


def _served(
    config: RunConfig, groups: Groups, group: list[int], ids_1NK: Tensor, num_experts: int
) -> dict[int, Tensor]:
    """The experts of the tokens of every rank of a group, (parts, T, K) int64, -1 of choices that a capacity drops."""
    if config.balance.capacity_factor is None:
        return {rank: groups.own_tokens(config, rank, ids_1NK)[0].long() for rank in group}
    capacity, sharing = Capacity(config.balance.capacity_factor, None), groups.around(group[0], "stage")
    own = torch.stack([groups.own_tokens(config, rank, ids_1NK)[0].long() for rank in sharing], dim=1)
    for of_part in own:  # tokens are served rank by rank
        ids_TK = of_part.flatten(0, 1)
        kept_TK = capacity(ids_TK, num_experts, torch.ones(len(ids_TK), dtype=torch.bool))
        of_part.masked_fill_(~kept_TK.view_as(of_part), -1)
    return {rank: own[:, sharing.index(rank)] for rank in group}


def _way(
    config: RunConfig,
    placement: Placement,
    groups: Groups,
    axes: list[str],
    rank: int,
    index: int,
    ledger: Ledger,
    layer: int,
) -> tuple[Site, tuple[Hop, ...]]:
    """A layer on a rank, by its index among the MoE layers; and the hops from there, through which nothing is sent."""
    site = Site.of(
        placement,
        index,
        config.parallel.expert_parallel_size,
        groups.around(rank, "dispatch").index(rank),
        one_row_per_copy=config.moe.combine == "per_expert",
        parts=config.parallel.expert_tensor_parallel_size,
    )
    links = []
    for peers in (groups.around(rank, axis) for axis in axes):
        tiers = [groups.tier(rank, other) for other in peers]
        links.append(Link(_Seat(peers.index(rank), len(peers)), ledger, layer, tiers))
    return site, way_to(site, links, config.moe.fixed_rows)


def _pass(
    config: RunConfig,
    groups: Groups,
    axes: list[str],
    ways: dict[int, tuple[Site, tuple[Hop, ...]]],
    given: dict[int, Tensor],
    hidden_size: int,
) -> dict[int, Passed]:
    """Count one pass of a layer over a group; `given` are the experts of every rank's tokens."""
    named: dict[int, Tensor] = {}
    for rank, (site, way) in ways.items():
        named[rank], _ = site.in_parts(given[rank], torch.empty(given[rank].shape))
        way[0].link.ledger.tokens[way[0].link.layer] += len(given[rank])
    sent = dict.fromkeys(ways, 0)
    for number, axis in enumerate(axes):
        hops = {rank: way[number] for rank, (_, way) in ways.items()}
        plans = {rank: _rows(named[rank], hop, first=number == 0) for rank, hop in hops.items()}
        recv: dict[int, list[int]] = {}
        came: dict[int, list[Tensor]] = {}
        for rank, hop in hops.items():
            peers = groups.around(rank, axis)
            own = peers.index(rank)
            recv[rank] = [plans[peer].send_rows[own] for peer in peers]
            _record(config, hop, plans[rank], recv[rank], hidden_size)
            sent[rank] += sum(plans[rank].send_rows) - plans[rank].send_rows[own]
            came[rank] = [plans[peer].slots_of_rank[own] for peer in peers]
        if number < len(axes) - 1:
            named = {rank: torch.cat(slots).long() for rank, slots in came.items()}
    return {
        rank: Passed(sum(recv[rank]), sum(int((run >= 0).sum()) for run in slots), sent[rank], slots[0].shape[1])
        for rank, slots in came.items()
    }


@dataclass(frozen=True)
class _Rows:
    """The rows of a rank on one hop."""

    send_rows: list[int]  # to every rank, those that stay empty too
    slots_of_rank: list[Tensor]  # (S, W) of the rows to every rank, which are in use


def _rows(ids_TK: Tensor, hop: Hop, *, first: bool) -> _Rows:
    size, own = hop.link.transport.size, hop.link.transport.rank
    slot_of_id, _ = hop.tables(ids_TK.device)
    sent = ops.plan_send(
        ids_TK,
        slot_of_id,
        num_ranks=size,
        slots_per_rank=hop.slots_per_rank,
        own_rank=own,
        one_row_per_copy=hop.one_row_per_copy,
    )
    counts: list[int] = sent.rows_per_rank_P.tolist()
    order = [*(p for p in range(size) if p != own), own]
    runs = sent.row_slot_SW[: sum(counts)].split([counts[p] for p in order])
    slots = [runs[order.index(p)] for p in range(size)]
    own_rows = len(ids_TK) * (ids_TK.shape[1] if hop.one_row_per_copy else 1)
    if size == 1 and first:  # where nothing is sent, rows are not counted: those of dropped choices stay empty
        return _Rows([own_rows], slots)
    if size == 1 or hop.fixed_rows is None:
        return _Rows(counts, slots)
    most = max(n for p, n in enumerate(counts) if p != own)
    if most > hop.fixed_rows:
        raise UserError(
            f"moe.fixed_rows ({hop.fixed_rows}) is less than the {most} rows that layer {hop.link.layer} has for a "
            "rank with this routing; raise it, or leave it out"
        )
    return _Rows([own_rows if p == own else hop.fixed_rows for p in range(size)], slots)


def _record(config: RunConfig, hop: Hop, rows: _Rows, recv_rows: list[int], hidden_size: int) -> None:
    """What dispatch.py and combine.py write into the ledger."""
    dtype, width = getattr(torch, config.train.dtype), rows.slots_of_rank[0].shape[1]
    row = Message(hidden_size, dtype)
    out = Message(hidden_size, dtype, 2 * width)
    if config.moe.fp8_dispatch:
        out = Message(quantised_row(hidden_size).num_bytes // 4, torch.float32, 2 * width)
    for _ in range(2 if config.train.recompute == "full" else 1):  # a layer that is computed again sends again
        hop.link.record(rows.send_rows, out.num_bytes, "dispatch")
        hop.link.record(recv_rows, row.num_bytes, "combine")
    hop.link.record(rows.send_rows, row.num_bytes, "combine_backward")
    hop.link.record(recv_rows, Message(hidden_size, dtype, width).num_bytes, "dispatch_backward")
