"""The table and the picture of the condensing benchmark: every figure over the number of layers that were changed.

A point is named `ARM, LAYERS`, and `original` is the point of all arms at 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("agg")
import matplotlib.pyplot as plt

ORIGINAL = "original"  # the name of what the arms are made of
Point = dict[str, Any]
Figure = Callable[[Point], float | None]


def by_arm(curve: dict[str, Point]) -> dict[str, dict[int, Point]]:
    """The points of every arm by layers, ascending, the original first."""
    arms: dict[str, dict[int, Point]] = {}
    for name, found in curve.items():
        if name != ORIGINAL:
            arm, layers = name.rsplit(", ", 1)
            arms.setdefault(arm, {0: curve[ORIGINAL]})[int(layers)] = found
    return {arm: dict(sorted(points.items())) for arm, points in arms.items()}


def show(curve: dict[str, Point]) -> None:
    """One line for a point."""
    columns = ("parameters", "loss", "tuned, all", "tuned, condensed", "bytes/token", "tokens/s", "x", "x, no exchange")
    table = Table("", *columns)
    for name, found in curve.items():
        tuned = found["heldout_loss_tuned"]
        ratios = [found[key] for key in ("speedup", "speedup_without_exchange")]
        table.add_row(
            name,
            f"{found['parameters']:,}",
            f"{found['heldout_loss']:.4f}",
            *(f"{tuned[key]:.4f}" if key in tuned else "" for key in ("all", "condensed")),
            f"{found['bytes_per_token']:.0f}",
            f"{found['tokens_per_second']['median']:.0f}",
            *(f"{one['median']:.2f} ({one['min']:.2f}, {one['max']:.2f})" for one in ratios),
        )
    Console(stderr=True, width=150).print(table)


def draw(path: Path, curve: dict[str, Point]) -> None:
    """Six panels, a line for each arm; bands are from the least to the largest round."""
    panels: dict[str, tuple[Figure, str | None]] = {
        "held-out loss, nats": (lambda one: one["heldout_loss"], None),
        "the same, all weights tuned": (lambda one: one["heldout_loss_tuned"]["all"], None),
        "parameters, millions": (lambda one: one["parameters"] / 1e6, None),
        "tokens per second, experts on 2 ranks": (lambda one: one["tokens_per_second"]["median"], "tokens_per_second"),
        "speed beside the original\n(dashed: all experts on each rank, nothing sent)": (
            lambda one: one["speedup"]["median"],
            "speedup",
        ),
        "bytes sent per token, forward": (lambda one: one["bytes_per_token"], None),
    }
    figure, axes = plt.subplots(2, 3, figsize=(18, 9))
    arms = by_arm(curve)
    for axis, (title, (value, spread)) in zip(axes.flat, panels.items(), strict=True):
        for arm, points in arms.items():
            layers = list(points)
            (line,) = axis.plot(layers, [value(one) for one in points.values()], marker=".", label=arm)
            colour = line.get_color()
            if spread is not None:
                least, most = ([one[spread][end] for one in points.values()] for end in ("min", "max"))
                axis.fill_between(layers, least, most, color=colour, alpha=0.15)
            if spread == "speedup":
                apart = [one["speedup_without_exchange"]["median"] for one in points.values()]
                axis.plot(layers, apart, color=colour, linestyle="--", alpha=0.7)
            if "tuned" in title:
                _draw_condensed(axis, points, arm, colour)
        axis.set(title=title, xlabel="layers changed")
        axis.grid(alpha=0.3)
    for axis in axes[0, :2]:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_condensed(axis: Any, points: dict[int, Point], arm: str, colour: str) -> None:
    """Losses after tuning what was condensed alone, where there are condensed layers."""
    found = {n: one["heldout_loss_tuned"] for n, one in points.items() if "condensed" in one["heldout_loss_tuned"]}
    if found:
        label = f"{arm}, condensed layers alone"
        axis.plot(list(found), [one["condensed"] for one in found.values()], ":", color=colour, marker="x", label=label)
