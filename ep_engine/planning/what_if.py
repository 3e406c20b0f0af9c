"""What if: a run under several rules and placements on one cluster, side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ep_engine.config import RunConfig, make_config
from ep_engine.errors import UserError

_FORMS = "topk, group_limited:GROUPS:M, c2r:T or c2r_grouped:T:M"
_KEYS: dict[str, tuple[str, ...]] = {
    "topk": (),
    "group_limited": ("num_groups", "max_devices"),
    "c2r": ("top_t",),
    "c2r_grouped": ("top_t", "max_devices"),
}


def variants(
    config: RunConfig, rules: Sequence[str], placements: Sequence[str], profile: Path | None
) -> Iterator[RunConfig]:
    """The run under each rule on each placement; its own of what is not asked for.

    Args:
        config: of the run.
        rules: such as `c2r:16`.
        placements: files, or `contiguous`.
        profile: for the lists of C2R; None: the run's.

    Raises:
        UserError: a rule is none, or its sizes are out of range.
    """
    raw = config.model_dump()
    lists = profile or config.routing.profile
    routings = [rule_section(rule, lists) for rule in rules] or [raw["routing"]]
    places = [None if one == "contiguous" else one for one in placements] or [raw["moe"]["placement"]]
    for routing in routings:
        for placement in places:
            moe = {**raw["moe"], "placement": placement}
            yield make_config({**raw, "routing": routing, "moe": moe}, "the run")


def rule_section(rule: str, profile: Path | None) -> dict[str, Any]:
    """Keys of the [routing] section that a word such as `c2r:16` stands for; UserError if it stands for none."""
    name, *sizes = rule.split(":")
    if name not in _KEYS or len(sizes) != len(_KEYS[name]) or not all(size.isdecimal() for size in sizes):
        raise UserError(f"--rule {rule} is none of {_FORMS}; write one of them")
    lists = {"profile": profile} if name.startswith("c2r") else {}
    return {"rule": name, **lists, **dict(zip(_KEYS[name], map(int, sizes), strict=True))}


def print_comparison(found: list[dict[str, Any]], console: Console) -> None:
    """Show every case, the layers of the only one, and what has not been validated."""
    first = found[0]
    counted = "" if first["ranks_counted"] == first["ranks"] else f", of which {first['ranks_counted']} are counted"
    console.print(f"{first['cluster']}: {first['ranks']} devices{counted}; times in ms, bytes per token")
    columns = ("rule", "placement", "step", "compute", "rows", "weights", "bubble", "tail rank", "own / mean")
    table = Table(*columns, "node", "network", "GB", "tokens/s", title="A step")
    for case in found:
        times = (case[f"{part}_ms"] for part in ("step", "compute", "rows", "dense", "bubble"))
        tail, sent = case["tail"], case["bytes_per_token"]
        table.add_row(
            case["rule"] + ("" if case["combine"] == "per_device" else ", a row per copy"),
            Path(case["placement"]).stem,
            *(f"{ms:.4g}" for ms in times),
            str(tail["rank"]),
            f"{tail['over_mean']:.2f}",
            *(f"{sent[tier]:.0f}" for tier in ("node", "network")),
            f"{case['memory_gb']:.3g}" + ("" if case["fits"] else " does not fit"),
            f"{case['tokens_per_second']:,.0f}",
        )
    console.print(table)
    if len(found) == 1:
        table = Table("layer", "compute", "rows", "busiest rank", title="Of that, by layer")
        for layer in first["layers"]:
            times = (f"{layer[kind]:.4g}" for kind in ("compute_ms", "rows_ms"))
            table.add_row(str(layer["layer"]), *times, str(layer["busiest_rank"]))
        console.print(table)
    for case in found:
        if not case["validated"]:
            console.print(f"{case['rule']}, {case['placement']}: not validated: {'; '.join(case['not_validated'])}")
    if first["validated"]:
        console.print(f"mean error of a step where predictions were compared: {first['mean_error']:.0%}")
