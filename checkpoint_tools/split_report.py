"""What a split gave to whom: overlaps of experts, their sizes, and how far scores told neurons apart; as pictures.

Letters:  L layers   E experts, residual ones first   N neurons
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from checkpoint_tools.importance import Importance
from ep_engine.c2r.collaboration_report import picture_kind
from ep_engine.errors import UserError
from ep_engine.output import whole_file

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_BINS = 60


def read_split(checkpoint: Path) -> dict[str, Any]:
    """split.json of a checkpoint; UserError if it has none."""
    path = checkpoint / "split.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; give a checkpoint that `split` has made") from None
    return record


def overlaps(record: dict[str, Any]) -> NDArray[np.float64]:
    """(L, E, E): share of the neurons of the one expert that the other has too; 1 on the diagonal."""
    width = record["intermediate_size"]
    found = []
    for experts in record["neurons"]:
        held_EN = np.zeros((len(experts), width))
        for number, neurons in enumerate(experts):
            held_EN[number, neurons] = 1
        found.append(held_EN @ held_EN.T / held_EN.sum(axis=1, keepdims=True))
    return np.stack(found)


def describe_split(record: dict[str, Any]) -> dict[str, Any]:
    """Neurons of an expert, least and most; share of neurons in no expert and in several; overlap of two, as means."""
    sizes = [len(neurons) for experts in record["neurons"] for neurons in experts]
    times_LN = _times(record)
    overlap_LEE = overlaps(record)
    count = overlap_LEE.shape[1]
    apart = ~np.eye(count, dtype=bool)
    return {
        "smallest_expert": min(sizes),
        "largest_expert": max(sizes),
        "neurons_in_none": float((times_LN == 0).mean()),
        "neurons_in_several": float((times_LN > 1).mean()),
        "overlap": float(overlap_LEE[:, apart].mean()) if count > 1 else 0.0,
    }


def save_split_picture(path: Path, record: dict[str, Any], scores: Importance | None = None) -> None:
    """`draw_split` in a file."""
    figure = draw_split(record, scores)
    with whole_file(path) as beside:
        figure.savefig(beside, format=picture_kind(path), dpi=110)
    plt.close(figure)


def draw_split(record: dict[str, Any], scores: Importance | None = None) -> Figure:
    """The mean overlap of experts over layers; how many experts a neuron has; how many neurons an expert has, as the
    mean over layers, the least and the most; of scores, those that neurons have from their own expert beside those from
    others, over all layers.
    """
    count = 3 if scores is None else 4
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4.4))
    residual = record.get("residual_experts", 0)
    mean_EE = overlaps(record).mean(axis=0)
    drawn = axes[0].imshow(mean_EE, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(drawn, ax=axes[0], fraction=0.046)
    named = f" (the first {residual} residual)" if residual else ""
    axes[0].set(title=f"overlap of experts{named}", xlabel="expert", ylabel="expert")
    times = _times(record).ravel()
    most = int(times.max())
    axes[1].bar(range(most + 1), np.bincount(times, minlength=most + 1) / len(times))
    axes[1].set(title="experts of a neuron", xlabel="experts", ylabel="share of neurons", xticks=range(most + 1))
    size_LE = np.array([[len(neurons) for neurons in experts] for experts in record["neurons"]])
    mean_E = size_LE.mean(axis=0)
    beyond_2E = np.stack([mean_E - size_LE.min(axis=0), size_LE.max(axis=0) - mean_E])
    axes[2].bar(range(len(mean_E)), mean_E, yerr=beyond_2E, capsize=2)
    axes[2].set(title=f"neurons of an expert{named}", xlabel="expert", ylabel="neurons")
    if scores is not None:
        own, others = _scores(record, scores)
        low = max(min(float(own[own > 0].min(initial=1)), float(others[others > 0].min(initial=1))), 1e-12)
        bins = np.geomspace(low, max(float(own.max()), float(others.max()), 2 * low), _BINS)
        for label, values in (("for other experts", others), ("for its own", own)):
            axes[3].hist(values, bins=bins, weights=np.full(len(values), 1 / len(values)), alpha=0.6, label=label)
        axes[3].set(title="importance of a neuron", xlabel="score", ylabel="share of neurons", xscale="log")
        axes[3].legend()
    figure.suptitle(
        f"split by {record['method']}: {record['intermediate_size']} neurons, {record['num_experts']} experts"
    )
    figure.tight_layout()
    return figure


def _times(record: dict[str, Any]) -> NDArray[np.int64]:
    """(L, N): experts that have a neuron."""
    width = record["intermediate_size"]
    return np.stack([np.bincount(np.concatenate(experts), minlength=width) for experts in record["neurons"]])


def _scores(record: dict[str, Any], scores: Importance) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of all layers: scores of neurons for routed experts that have them, and for those that have not."""
    residual = record.get("residual_experts", 0)
    own, others = [], []
    for layer, experts in enumerate(record["neurons"]):
        score_EN = scores.layer(layer)
        held_EN = np.zeros(score_EN.shape, dtype=bool)
        for expert, neurons in enumerate(experts[residual:]):
            held_EN[expert, neurons] = True
        own.append(score_EN[held_EN])
        others.append(score_EN[~held_EN])
    return np.concatenate(own), np.concatenate(others)
