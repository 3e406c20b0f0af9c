"""Simulate: how long a step of a run would take on a cluster, from the experts that a trace's tokens went to.

Rows are planned as in a run (expert_traffic.py), so every rank has its own bytes and its own copies. A layer begins and
ends its experts together: it takes what the busiest rank computes outside of the experts, what the busiest of them
computes inside, and every exchange as long as the rank with most bytes in or out needs; of the exchanges a cluster may
hide a share behind computation. Gathered weights and summed gradients come on top, on the rank with most of them. A
pipeline takes the time of its slowest position, and (ranks - 1) / (parts * stages of a rank) of it to fill and drain.

On many ranks only some expert-parallel groups are counted, and some of their tokens; the others are of the same kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ep_engine.config import RunConfig, differing
from ep_engine.errors import UserError
from ep_engine.ledger import DIRECTIONS, Ledger
from ep_engine.model_config import ModelConfig
from ep_engine.planning import work
from ep_engine.planning.cluster import Cluster, Kind
from ep_engine.planning.dense_traffic import dense_traffic
from ep_engine.planning.expert_traffic import ExpertTraffic, Groups, count_traffic, thin, transport_of
from ep_engine.planning.memory import Step
from ep_engine.planning.routing_trace import choose_again, read_ids
from ep_engine.resolve import Layout, resolve_layout

MOST_RANKS = 64  # that are counted of every pipeline stage, or one expert-parallel group
MOST_TOKENS = 1 << 17  # of theirs; of more, every n-th stands for n
_KIND_OF: dict[str, Kind] = {
    "gather_weights": "gather",
    "reduce_gradients": "reduce",
    "tensor_parallel": "gather",
    "pipeline": "rows",
}
# What changes a step and had its default wherever predictions were compared.
_AT_DEFAULT = {
    "data": {"packing"},
    "train": {"dtype", "micro_batches", "recompute", "trainable", "freeze"},
    "balance": {"capacity_factor"},
    "parallel": {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "expert_tensor_parallel_size",
        "reshard_after_forward",
    },
    "moe": {"fp8_dispatch", "fixed_rows"},
}


@dataclass(frozen=True)
class Case:
    """A run on a cluster, counted."""

    config: RunConfig
    cluster: Cluster
    layout: Layout
    groups: Groups
    traffic: ExpertTraffic
    steps: dict[int, Step]  # of every rank that is counted


def simulate(config: RunConfig, cluster: Cluster, trace: Path) -> dict[str, Any]:
    """Step time, tail and memory of a run.

    Args:
        config: of the run; its rule is applied to the trace's scores if it is not plain top-k.
        cluster: with as many devices as the run has ranks.
        trace: of the model, of `ep-engine profile --trace`.

    Returns:
        `step_ms` and its parts, `layers`, `tail`, `memory_gb`, `tokens_per_second`, `bytes_per_token`; `validated`, or
        why not.

    Raises:
        UserError: the run is impossible on the cluster, or the trace does not fit it.
    """
    case = _counted(config, cluster, trace)
    parts = _Parts.of(case)
    tokens = config.data.batch_size * config.data.sequence_length
    memory = {rank: step.tape.peak.total() / 1e9 for rank, step in case.steps.items()}
    fullest = max(memory, key=lambda rank: memory[rank])
    sent = Ledger()
    for ledger in case.traffic.ledgers.values():
        sent.add(ledger)
    reasons = _not_validated(config, cluster, case.layout.model)
    return {
        "cluster": cluster.name,
        "ranks": cluster.devices,
        "ranks_counted": len(case.steps),
        "rule": _rule_of(case.layout.model),
        "placement": str(config.moe.placement or "contiguous"),
        "combine": config.moe.combine,
        "step_ms": parts.step_ms,
        "compute_ms": parts.compute_ms,
        "rows_ms": parts.rows_ms,
        "dense_ms": parts.dense_ms,
        "bubble_ms": parts.bubble_ms,
        "layers": parts.layers,
        "tail": parts.tail(),
        "tokens_per_second": tokens / parts.step_ms * 1e3,
        "bytes_per_token": sent.bytes_by_tier(),
        "memory_gb": memory[fullest],
        "fits": memory[fullest] <= cluster.device.memory_gb,
        "validated": not reasons,
        "not_validated": reasons,
        "mean_error": cluster.validated.mean_error if cluster.validated else None,
    }


def _counted(config: RunConfig, cluster: Cluster, trace: Path) -> Case:
    ranks, per_node = cluster.devices, cluster.devices_per_node
    layout = resolve_layout(config, ranks, config.model.checkpoint, ranks_per_node=per_node)
    if layout.placement is None:
        raise UserError("simulate follows tokens to their experts, and the run's model is dense; use `ep-engine plan`")
    groups = Groups.of(config, ranks, per_node).some(MOST_RANKS)
    ids_LTK = _experts(trace, layout.model)
    counted = groups.counted()
    of_rank = config.data.batch_size * config.data.sequence_length // len(groups.around(0, "dp"))
    thinned, factor = thin(config, of_rank * len(counted), MOST_TOKENS)
    sizes = layout.stages, layout.placement, groups, ids_LTK, layout.model
    traffic = count_traffic(thinned, *sizes).times(factor)
    transport = transport_of(config, groups, layout.placement)
    shape = config, layout.model, layout.stages, layout.placement, groups
    steps = {rank: Step(*shape, rank, traffic.passed, transport=transport) for rank in counted}
    for step in steps.values():
        step.walk()
    return Case(config, cluster, layout, groups, traffic, steps)


def _experts(trace: Path, model: ModelConfig) -> Tensor:
    moe = model.moe
    assert moe is not None, "the caller has asked"
    ids_LTK = read_ids(trace, model.experts_of_layer(), moe.top_k)
    return ids_LTK if moe.routing.rule == "topk" else choose_again(trace, ids_LTK, model)


@dataclass
class _Parts:
    """Where the time of a step goes."""

    layers: list[dict[str, Any]]
    own_ms: dict[int, float]  # what each rank computes, and its own bytes take, waiting for nobody
    compute_ms: float
    rows_ms: float
    dense_ms: float
    bubble_ms: float

    @classmethod
    def of(cls, case: Case) -> "_Parts":
        """Follow a step."""
        own = dict.fromkeys(case.steps, 0.0)
        layers = [_layer(case, layer, own) for layer in range(case.layout.model.num_layers)]
        pipeline = len(case.groups.around(0, "pp"))
        of_position = [_position(case, layers, position, own) for position in range(pipeline)]
        compute, rows = max(of_position, key=sum)
        per_rank = len(case.layout.stages.layers) // pipeline
        bubble = (compute + rows) * (pipeline - 1) / (case.config.train.micro_batches * per_rank)
        return cls(layers, own, compute, rows, _dense_ms(case), bubble)

    @property
    def step_ms(self) -> float:
        """All of it."""
        return self.compute_ms + self.rows_ms + self.dense_ms + self.bubble_ms

    def tail(self) -> dict[str, Any]:
        """The rank that all others wait for most."""
        rank = max(self.own_ms, key=lambda one: self.own_ms[one])
        mean = sum(self.own_ms.values()) / len(self.own_ms)
        return {"rank": rank, "own_ms": self.own_ms[rank], "over_mean": self.own_ms[rank] / mean}


def _layer(case: Case, layer: int, own_ms: dict[int, float]) -> dict[str, Any]:
    """One layer, all parts of the batch, forward and backward; adds to what every rank has to do by itself."""
    device, compute = case.cluster.device, 0.0
    ranks = [r for r, step in case.steps.items() if any(layer in one.layers for one in step.weights.values())]
    inside = dict.fromkeys(ranks, 0.0)
    for number in range(case.config.train.micro_batches):
        outside: dict[int, float] = {}
        experts: dict[int, float] = {}
        for rank in ranks:
            part, passed = case.steps[rank].part, case.traffic.passed.get((rank, layer, number))
            kept = part.layer(layer, passed)
            outside[rank] = work.of_layer(part, layer, kept).ms(device)
            experts[rank] = 0.0 if passed is None else work.of_experts(part, passed, kept).ms(device)
            own_ms[rank] += outside[rank] + experts[rank]
            inside[rank] += experts[rank]
        compute += max(outside.values()) + max(experts.values())
    rows = _rows_ms(case, layer, ranks, own_ms)
    hidden = min(case.cluster.overlap * rows, compute)
    busiest = max(inside, key=lambda rank: inside[rank])
    return {"layer": layer, "compute_ms": compute, "rows_ms": rows - hidden, "busiest_rank": busiest}


def _rows_ms(case: Case, layer: int, ranks: Sequence[int], own_ms: dict[int, float]) -> float:
    """All exchanges of experts' rows of a layer."""
    if len(case.groups.axes["dispatch"][0]) == 1:
        return 0.0
    assert case.layout.placement is not None, "the model has experts"
    hops = transport_of(case.config, case.groups, case.layout.placement) == "hierarchical"
    parts = case.config.train.micro_batches
    total = 0.0
    for there, back in zip(DIRECTIONS[::2], DIRECTIONS[1::2], strict=True):
        for way, other in ((there, back), (back, there)):
            of_tier = {tier: _tier_ms(case, layer, ranks, way, other, tier, own_ms) for tier in ("node", "network")}
            total += sum(of_tier.values()) if hops else max(of_tier.values())
            reached = [case.cluster.tier(tier).latency_us * 1e-3 for tier, ms in of_tier.items() if ms > 0]
            # Counts travel before the rows of a dispatch.
            total += parts * (sum(reached) if hops else max(reached, default=0.0)) * (2 if way == "dispatch" else 1)
    return total


def _tier_ms(
    case: Case, layer: int, ranks: Sequence[int], way: str, other: str, tier: str, own_ms: dict[int, float]
) -> float:
    """One exchange over links of a tier, without the latency: as long as the rank with most bytes needs."""
    out = {rank: case.traffic.ledgers[rank].sent[layer, way, tier] for rank in ranks}
    back = {rank: case.traffic.ledgers[rank].sent[layer, other, tier] for rank in ranks}
    if not sum(out.values()):
        return 0.0
    # What a rank sends back has come to it: a byte of the other way stands for so many of this.
    ratio = sum(out.values()) / max(sum(back.values()), 1)
    links = case.cluster.tier(tier)
    ms = {}
    for rank in ranks:
        most = max(out[rank], back[rank] * ratio)
        ms[rank] = links.ms("rows", most)
        own_ms[rank] += ms[rank]
    if not links.shared:
        return max(ms.values())
    of_node: dict[int, float] = {}
    for rank in ranks:
        node = case.groups.node_of_rank[rank]
        of_node[node] = of_node.get(node, 0.0) + ms[rank]
    return max(of_node.values())


def _position(case: Case, layers: list[dict[str, Any]], position: int, own_ms: dict[int, float]) -> tuple[float, float]:
    """What a place of the pipeline computes and exchanges in a step."""
    stages, device = case.layout.stages, case.cluster.device
    here = [layer for stage in stages.on(position) for layer in stages.layers[stage]]
    compute, rows = (sum(layers[layer][kind] for layer in here) for kind in ("compute_ms", "rows_ms"))
    ranks = [rank for rank in case.steps if case.groups.around(rank, "pp").index(rank) == position]
    ends = []
    for rank in ranks:
        step = case.steps[rank]
        ms = work.of_optimizer(sum(group.own for one in step.weights.values() for group in one.all())).ms(device)
        if stages.last in step.weights:
            ms += work.of_head(step.part).ms(device) * step.parts
        own_ms[rank] += ms
        ends.append(ms)
    return compute + max(ends), rows


def _dense_ms(case: Case) -> float:
    """Gathered weights, summed gradients, and what tensor and pipeline parallelism exchange, on the worst rank."""
    found = []
    for step in case.steps.values():
        ms = 0.0
        for kind, of_tier in dense_traffic(step, case.groups).items():
            for tier, num_bytes in of_tier.items():
                if tier != "self" and num_bytes:
                    links = case.cluster.tier(tier)
                    sharers = case.cluster.devices_per_node if links.shared else 1
                    ms += links.ms(_KIND_OF[kind], num_bytes * sharers)
        found.append(ms)
    return max(found)


def _rule_of(model: ModelConfig) -> str:
    assert model.moe is not None, "the caller has asked"
    routing = model.moe.routing
    sizes = {"T": routing.top_t, "M": routing.max_devices}
    read = {"topk": "", "c2r": "T", "group_limited": "M", "c2r_grouped": "TM"}[routing.rule]
    return " ".join([routing.rule, *(f"{name}={sizes[name]}" for name in read)])


def _not_validated(config: RunConfig, cluster: Cluster, model: ModelConfig) -> list[str]:
    """Why a prediction lies outside of what has been compared with measurements."""
    range_ = cluster.validated
    if range_ is None:
        return [f"the figures of {cluster.name} are {cluster.origin} and no prediction was compared with a run"]
    reasons = []
    if not range_.nodes[0] <= cluster.nodes <= range_.nodes[1]:
        reasons.append(f"{cluster.nodes} nodes, compared were {range_.nodes[0]} to {range_.nodes[1]}")
    low, high = range_.network_gbit_per_s
    if cluster.network is not None and not low <= cluster.network.gbit_per_s <= high:
        reasons.append(f"a network of {cluster.network.gbit_per_s:g} Gbit/s, compared were {low:g} to {high:g}")
    if not range_.hidden_size[0] <= model.hidden_size <= range_.hidden_size[1]:
        reasons.append(
            f"a width of {model.hidden_size}, compared were {range_.hidden_size[0]} to {range_.hidden_size[1]}"
        )
    assert model.moe is not None, "the caller has asked"
    if model.moe.routing.rule not in range_.rules:
        reasons.append(f"rule {model.moe.routing.rule}, compared were {', '.join(range_.rules)}")
    for section, names in _AT_DEFAULT.items():
        of = getattr(config, section)
        for name in (name for name in differing(of) if name in names):
            reasons.append(f"{section}.{name} {getattr(of, name)}, compared was {type(of).model_fields[name].default}")
    if cluster.devices_per_node > 1:
        reasons.append(f"{cluster.devices_per_node} devices a node, compared was 1")
    if cluster.devices != config.parallel.expert_parallel_size:
        reasons.append(f"several copies of an expert on {cluster.devices} devices, compared was one")
    return reasons
