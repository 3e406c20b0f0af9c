"""The report of the quickstart: one HTML page that opens without network, pictures inside it."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile
from ep_engine.ledger import DIRECTIONS
from ep_engine.output import whole_file
from ep_engine.placement import Placement

COLUMNS = ("arm", "held-out loss", "bytes", "devices", "load", "tokens/s", "changed")
BYTE_COLUMNS = ("bytes", *(direction.replace("_", " ") for direction in DIRECTIONS))
CAPTION = (
    "Per token: bytes that left a rank, over all layers and both directions, forward and backward; distinct devices. "
    "Load: the busiest expert over the mean. Changed: tokens whose experts are not those of plain top-k."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } figcaption { color: #555; }
figure { margin: 2rem 0; }
"""


def table_rows(arms: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The closing table: a row for each arm, under `COLUMNS`."""
    return [
        (
            name,
            f"{arm['heldout_loss']:.4f}",
            f"{arm['bytes_per_token']:.0f}",
            f"{arm['devices_per_token']:.3f}",
            f"{arm['load_max_over_mean']:.3f}",
            f"{arm['tokens_per_second']:.0f}",
            f"{arm['changed_share']:.1%}",
        )
        for name, arm in arms.items()
    ]


def byte_rows(arms: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Where the bytes of each arm go: a row for each arm, under `BYTE_COLUMNS`."""
    directions = [[arm["bytes_by_direction"][direction] for direction in DIRECTIONS] for arm in arms.values()]
    return [(name, *(f"{value:.0f}" for value in values)) for name, values in zip(arms, directions, strict=True)]


def write_report(
    path: Path,
    summary: dict[str, Any],
    profile: Profile,
    placement: Placement,
    contiguous: Placement,
    metrics: dict[str, list[dict[str, Any]]],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        summary: as in summary.json.
        profile: co-activation of the model before the arms part.
        placement: the best one.
        contiguous: experts in the order of their ids.
        metrics: lines of metrics.jsonl, by name of the arm.
    """
    figures = [
        (
            "Who works with whom, before (experts by id) and after placement (grouped by device): share of a layer's "
            "co-activated pairs. What lies inside a white frame stays on one device.",
            draw_coactivation(profile, placement, contiguous),
        ),
        ("Training loss of the four arms: same checkpoint, same steps, same data.", draw_losses(metrics)),
        (
            "Bytes that leave a rank per token, over all layers, by direction, from the ledger.",
            draw_bytes(summary["arms"]),
        ),
        ("Bytes that leave a rank per token, layer by layer.", draw_bytes_by_layer(summary["arms"])),
    ]
    dense = summary["dense"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>ep_engine quickstart</title>",
        f"<style>{_STYLE}</style>",
        "<h1>ep_engine quickstart</h1>",
        f"<p>Dense model: held-out loss {dense['heldout_loss']:.4f} nats, unigram entropy "
        f"{dense['unigram_entropy']:.4f}. Four ways to route from one checkpoint on {summary['ranks']} ranks, "
        f"{summary['seconds']:.0f} s and {summary['peak_gib']:.1f} GiB in all, on "
        f"{html.escape(summary['machine'])}.</p>",
        _table(COLUMNS, table_rows(summary["arms"])),
        f"<p>{CAPTION}</p>",
        _table(BYTE_COLUMNS, byte_rows(summary["arms"])),
        *(f"<figure><img alt='' src='{_inline(f)}'><figcaption>{text}</figcaption></figure>" for text, f in figures),
        "<details><summary>summary.json</summary><pre>",
        html.escape(json.dumps(summary, indent=1)),
        "</pre></details></html>",
    ]
    with whole_file(path) as beside:
        beside.write_text("\n".join(parts), encoding="utf-8")


def draw_coactivation(profile: Profile, placement: Placement, contiguous: Placement) -> Figure:
    """Heat maps of pair shares, a column for each layer: experts by id above, by device below."""
    layers = profile.num_layers
    figure, axes = plt.subplots(2, layers, figsize=(3 * layers, 6.4), squeeze=False)
    for layer in range(layers):
        counts = profile.counts[layer]
        for row, (name, one) in enumerate((("by id", contiguous), ("placed", placement))):
            order = [expert for expert in one.layers[layer] if expert >= 0]
            axis = axes[row, layer]
            axis.imshow(_shares(counts)[np.ix_(order, order)], cmap="viridis", vmin=0)
            device_of_expert = one.device_of_expert(layer)
            inside = _frames(axis, [device_of_expert[expert] for expert in order], _shares(counts), device_of_expert)
            axis.set_title(f"layer {layer}, {name}: {inside:.0%} inside", fontsize=9)
            axis.set_xticks(range(len(order)), order, fontsize=7)
            axis.set_yticks(range(len(order)), order, fontsize=7)
    figure.tight_layout()
    return figure


def _frames(axis: Any, devices: list[int], shares: NDArray[np.float64], device_of_expert: list[int]) -> float:
    """Draw a frame around each device's experts; returns the share of pairs inside."""
    for device in sorted(set(devices)):
        first, size = devices.index(device) - 0.5, devices.count(device)
        axis.add_patch(Rectangle((first, first), size, size, fill=False, edgecolor="white", linewidth=2))
    device_E = np.array(device_of_expert)
    return float(shares[device_E[:, None] == device_E[None, :]].sum())


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = counts / max(int(counts.sum()), 1)
    return shares


def draw_losses(metrics: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss over steps, a line for each arm; below, what each arm adds to the loss of the first."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    first = next(iter(metrics.values()))
    for i, (name, lines) in enumerate(metrics.items()):
        steps = [line["step"] for line in lines]
        style = {"label": name, "linestyle": ("-", "--")[i % 2]}  # where two lines are one, both show
        above.plot(steps, [line["loss"] for line in lines], **style)
        below.plot(steps, [line["loss"] - base["loss"] for line, base in zip(lines, first, strict=True)], **style)
    above.set(ylabel="training loss, nats per token")
    below.set(xlabel="step", ylabel=f"minus the loss of {next(iter(metrics))}")
    above.legend()
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def draw_bytes(arms: dict[str, dict[str, Any]]) -> Figure:
    """A bar for each arm, parts by direction."""
    figure, axis = plt.subplots(figsize=(8, 3.5))
    left = np.zeros(len(arms))
    for direction in DIRECTIONS:
        values = np.array([arm["bytes_by_direction"][direction] for arm in arms.values()])
        axis.barh(list(arms), values, left=left, label=direction.replace("_", " "))
        left += values
    axis.invert_yaxis()
    axis.set(xlabel="bytes per token")
    axis.legend(loc="lower right")
    figure.tight_layout()
    return figure


def draw_bytes_by_layer(arms: dict[str, dict[str, Any]]) -> Figure:
    """Groups of bars by layer, a bar for each arm."""
    figure, axis = plt.subplots(figsize=(8, 3.5))
    width = 0.8 / len(arms)
    for i, (name, arm) in enumerate(arms.items()):
        values = arm["bytes_by_layer"]
        axis.bar(np.arange(len(values)) + i * width, values, width, label=name)
    layers = len(next(iter(arms.values()))["bytes_by_layer"])
    axis.set_xticks(np.arange(layers) + 0.4 - width / 2, [f"layer {layer}" for layer in range(layers)])
    axis.set(ylabel="bytes per token")
    axis.legend(loc="lower right")
    figure.tight_layout()
    return figure


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _inline(figure: Figure) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
