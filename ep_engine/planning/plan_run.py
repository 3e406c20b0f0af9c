"""Plan: what a run will need and send on every rank, from its configuration alone; no devices, no processes.

Nothing is read but model.json, the placement, the profile of the rule and a trace. The result is plain values, which
`--json` prints and `print_plan` shows.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ep_engine.config import RunConfig
from ep_engine.errors import UserError
from ep_engine.ledger import DIRECTIONS, TIERS, Ledger
from ep_engine.planning.dense_traffic import dense_traffic
from ep_engine.planning.expert_traffic import ExpertTraffic, Groups, count_traffic, thin, transport_of
from ep_engine.planning.memory import KINDS, Step
from ep_engine.planning.routing_trace import DRAWN, draw_routing, read_trace
from ep_engine.resolve import Layout, resolve_layout

_AXES = ("pp", "dp", "tp", "edp", "ep", "etp", "dispatch", "stage")


def plan_run(
    config: RunConfig, world_size: int, *, ranks_per_node: int | None = None, trace: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Groups, memory and traffic of a step.

    Args:
        config: of the run.
        world_size: ranks of the job.
        ranks_per_node: of the job; None: all on one node.
        trace: of the experts' tokens, or a profile; None: uniform random routing under the model's rule.
        seed: of what is drawn.

    Raises:
        UserError: the run is impossible on these ranks, or the trace does not fit it.
    """
    per_node = ranks_per_node or world_size
    if world_size % per_node:
        raise UserError(
            f"--ranks-per-node ({per_node}) must divide --ranks ({world_size}): nodes have the same number; correct one"
        )
    layout = resolve_layout(config, world_size, config.model.checkpoint, ranks_per_node=ranks_per_node)
    groups = Groups.of(config, world_size, per_node)
    traffic, routing = _experts(config, layout, groups, trace, seed)
    transport = transport_of(config, groups, layout.placement) if layout.placement else "none"
    sizes = config, layout.model, layout.stages, layout.placement, groups
    steps = [Step(*sizes, rank, traffic.passed, transport=transport) for rank in range(world_size)]
    memory = [_memory(step) for step in steps]
    return {
        "ranks": world_size,
        "ranks_per_node": per_node,
        "dtype": config.train.dtype,
        "routing": routing,
        "transport": transport,
        "ignored": ignored(config),
        "groups": [_groups(step, groups) for step in steps],
        "memory": {"ranks": memory, "alike": _alike(memory)},
        "traffic": {
            "experts": _sum_of([*traffic.ledgers.values()]),
            "experts_of_ranks": [_sum_of([ledger])["total"] for ledger in traffic.ledgers.values()],
            "dense_of_ranks": [dense_traffic(step, groups) for step in steps],
        },
    }


def ignored(config: RunConfig) -> list[str]:
    """What of a run the plan does not know, in words."""
    found = []
    if config.train.freeze or config.train.trainable != "all":
        found.append("that frozen weights keep less for the backward: activations are those of training all")
    if config.data.packing != "stream":
        found.append(
            f"how much of the rows is padding with data.packing {config.data.packing}: it is counted like other tokens"
        )
    return found


def _experts(
    config: RunConfig, layout: Layout, groups: Groups, trace: Path | None, seed: int
) -> tuple[ExpertTraffic, str]:
    if layout.placement is None:
        if trace is not None:
            raise UserError(f"--trace {trace} has no effect on a dense model; leave it out")
        return ExpertTraffic({rank: Ledger() for rank in range(len(groups.node_of_rank))}), "none: the model is dense"
    step = config.data.batch_size * config.data.sequence_length
    thinned, factor = thin(config, step, DRAWN) if trace is None else (config, 1)
    tokens = step // factor
    if trace is None:
        of = f", 1 of {factor} tokens" if factor > 1 else ""
        ids_LNK, what = draw_routing(layout.model, tokens, seed), f"uniform random, seed {seed}{of}"
    else:
        ids_LNK, what = read_trace(trace, layout.model, tokens, seed)
    found = count_traffic(thinned, layout.stages, layout.placement, groups, ids_LNK, layout.model)
    return found.times(factor), what


def _groups(step: Step, groups: Groups) -> dict[str, Any]:
    layers = [layer for weights in step.weights.values() for layer in weights.layers]
    around = {axis: groups.around(step.rank, axis) for axis in _AXES}
    return {"rank": step.rank, "node": groups.node_of_rank[step.rank], "layers": sorted(layers), **around}


def _memory(step: Step) -> dict[str, Any]:
    tape = step.walk()
    kinds = {kind: tape.peak[kind] for kind in KINDS}
    return {"rank": step.rank, "total": tape.peak.total(), "when": tape.when, "bytes": kinds}


def _alike(memory: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks with as many weights and the same moment, each with the figures of the one that needs most."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in memory:
        key = one["bytes"]["parameters"], one["bytes"]["moments"], one["when"].split(" in ")[-1]
        found.setdefault(key, []).append(one)
    alike = []
    for ranks in found.values():
        most = max(ranks, key=lambda one: int(one["total"]))
        least = min(one["total"] for one in ranks)
        alike.append({**most, "ranks": [one["rank"] for one in ranks], "least": least})
    return alike


def _sum_of(ledgers: list[Ledger]) -> dict[str, Any]:
    """Bytes of some ranks, by layer and in all."""
    sent: Counter[tuple[int, str, str]] = Counter()
    for ledger in ledgers:
        sent.update(ledger.sent)
    layers = sorted({layer for layer, _, _ in sent})
    return {
        "layers": [
            {"layer": layer, **{d: {tier: sent[layer, d, tier] for tier in TIERS} for d in DIRECTIONS}}
            for layer in layers
        ],
        "total": {d: {tier: sum(sent[layer, d, tier] for layer in layers) for tier in TIERS} for d in DIRECTIONS},
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Show the plan: who is with whom, memory, bytes."""
    console.print(
        f"{plan['ranks']} ranks, {plan['ranks_per_node']} on a node, {plan['dtype']}; experts' rows over "
        f"{plan['transport']}; routing: {plan['routing']}"
    )
    for what in plan["ignored"]:
        console.print(f"The plan does not know {what}.")
    console.print(_group_table(plan), _memory_table(plan), *_traffic_tables(plan))


def _group_table(plan: dict[str, Any]) -> Table:
    table = Table("rank", "node", "layers", *_AXES, title="Groups of every rank")
    for row in plan["groups"]:
        ranks = (_numbers(row[axis]) for axis in _AXES)
        table.add_row(str(row["rank"]), str(row["node"]), _numbers(row["layers"]), *ranks)
    return table


def _memory_table(plan: dict[str, Any]) -> Table:
    alike = plan["memory"]["alike"]
    title = "Most memory of a rank in a step: tensors, MB"
    table = Table("ranks", *(_numbers(one["ranks"]) for one in alike), title=title)
    for kind in (kind for kind in KINDS if any(one["bytes"][kind] for one in alike)):
        table.add_row(kind, *(_mega(one["bytes"][kind]) for one in alike))
    table.add_section()
    table.add_row("total", *(_mega(one["total"]) for one in alike))
    table.add_row("least of them", *(_mega(one["least"]) for one in alike))
    table.add_row("in", *(one["when"] for one in alike))
    return table


def _traffic_tables(plan: dict[str, Any]) -> list[Table]:
    traffic = plan["traffic"]
    tables = []
    if traffic["experts"]["layers"]:
        total = traffic["experts"]["total"]
        columns = [(d, tier) for tier in TIERS[1:] for d in DIRECTIONS if total[d][tier]]
        names = [[*d.split("_"), "over the", tier] for d, tier in columns]
        table = Table("layer", *("\n".join(name) for name in names))
        table.title = "Experts' rows that leave a rank in a step, of all ranks, MB"
        for layer in traffic["experts"]["layers"]:
            table.add_row(str(layer["layer"]), *(_mega(layer[d][tier]) for d, tier in columns))
        table.add_row("all", *(_mega(total[d][tier]) for d, tier in columns))
        tables.append(table)
    dense = traffic["dense_of_ranks"]
    kinds = [kind for kind in dense[0] if any(any(one[kind].values()) for one in dense)]
    if kinds:
        table = Table("dense traffic", *TIERS[1:], title="What else leaves a rank, the most of any, MB")
        for kind in kinds:
            table.add_row(kind.replace("_", " "), *(_mega(max(one[kind][tier] for one in dense)) for tier in TIERS[1:]))
        tables.append(table)
    return tables


def _mega(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g}" if num_bytes < 100e6 else f"{num_bytes / 1e6:.0f}"


def _numbers(numbers: list[int]) -> str:
    """Ascending numbers, runs of them as first-last, or first-last by step."""
    steps = {second - first for first, second in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}-{numbers[-1]} by {steps.pop()}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
