"""What a profile says of a model's experts: how many partners they have, and how far its counts can be trusted.

Letters:  L MoE layers   E experts
"""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile
from ep_engine.errors import UserError
from ep_engine.output import whole_file

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_DRAWN = 8  # layers


def describe_collaboration(profile: Profile) -> dict[str, Any]:
    """Figures of every layer, and means over layers. With P_ij = C_ij / sum over j of C_ij, j != i:

    `entropy` H_i = - sum P_ij ln P_ij in nats, `collaboration` H_i / ln(E - 1) in [0, 1], `partners` with any token in
    common and `top_partner_share` max P_ij, all as means over experts that have pairs; `load_cv`, standard deviation
    over mean of the experts' load, and `load_max_over_mean`.
    """
    layers = [
        _describe_layer(counts, load)
        for counts, load in zip(profile.counts_of_layer, profile.load_of_layer, strict=True)
    ]
    return {**{key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}, "layers": layers}


def _describe_layer(counts_EE: NDArray[np.int64], load_E: NDArray[np.int64]) -> dict[str, float]:
    sums = counts_EE.sum(axis=1)
    share_EE = counts_EE[sums > 0] / sums[sums > 0, None]
    entropy_E = -(share_EE * np.log(np.where(share_EE > 0, share_EE, 1.0))).sum(axis=1)
    alone = not len(entropy_E)
    mean = max(float(load_E.mean()), np.finfo(np.float64).tiny)
    most = math.log(len(counts_EE) - 1) if len(counts_EE) > 2 else 1.0
    return {
        "entropy": 0.0 if alone else float(entropy_E.mean()),
        "collaboration": 0.0 if alone else float(entropy_E.mean()) / most,
        "partners": 0.0 if alone else float((share_EE > 0).sum(axis=1).mean()),
        "top_partner_share": 0.0 if alone else float(share_EE.max(axis=1).mean()),
        "load_cv": float(load_E.std()) / mean,
        "load_max_over_mean": float(load_E.max()) / mean,
    }


def draw_collaboration(profile: Profile, halves: list[tuple[int, float]]) -> Figure:
    """Heat maps of the first layers, experts in the order of their ids; then collaboration and load of every layer, and
    the agreement of halves as the profile grew (tokens of a half, mean correlation).
    """
    described = describe_collaboration(profile)["layers"]
    shown = min(profile.num_layers, _DRAWN)
    columns = min(4, max(shown, 3))
    rows = -(-shown // columns)
    figure = plt.figure(figsize=(3.2 * columns, 3.0 * rows + 3.0))
    grid = figure.add_gridspec(rows + 1, 3 * columns)
    for layer in range(shown):
        at = 3 * (layer % columns)
        axis = figure.add_subplot(grid[layer // columns, at : at + 3])
        counts = profile.counts_of_layer[layer]
        image = axis.imshow(counts / max(int(counts.sum()), 1), cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axis, fraction=0.046)
        axis.set_title(f"layer {layer}: share of pairs", fontsize=9)
    third = columns
    collaboration = figure.add_subplot(grid[rows, :third])
    collaboration.bar(range(profile.num_layers), [layer["collaboration"] for layer in described])
    collaboration.set(title="collaboration, H / ln(E - 1)", xlabel="layer", ylim=(0, 1))
    load = figure.add_subplot(grid[rows, third : 2 * third])
    load.bar(range(profile.num_layers), [layer["load_max_over_mean"] for layer in described])
    load.set(title="load of experts, max / mean", xlabel="layer")
    trust = figure.add_subplot(grid[rows, 2 * third :])
    if halves:
        trust.plot([tokens for tokens, _ in halves], [mean for _, mean in halves], marker="o")
        trust.set_xscale("log")
    trust.set(title="agreement of halves", xlabel="tokens of a half", ylim=(min([0.0, *(m for _, m in halves)]), 1.02))
    for axis in (collaboration, load, trust):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def picture_kind(path: Path) -> str:
    """The format that the suffix of a picture names."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"--picture {path} must end in .png, .svg or .pdf; choose one")
    return kind


def save_picture(path: Path, profile: Profile, halves: list[tuple[int, float]]) -> None:
    """`draw_collaboration` in a file."""
    figure = draw_collaboration(profile, halves)
    with whole_file(path) as beside:
        figure.savefig(beside, format=picture_kind(path), dpi=110)
    plt.close(figure)
