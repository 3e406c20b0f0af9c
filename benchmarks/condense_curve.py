"""Arms of the condensing benchmark: what is made of a model at every number of layers, and what is measured of it.

    E(a+b)      a shared and b other experts in a condensed layer, and no router
    layer drop  no FFN                  block drop  no layer
    merged      fewer experts, each the mean of some that are alike (M-SMoE)

    fitted           E(a+b) with least-squares weights in the place of means
    frequency, mass  E(a+b) of the b experts that most tokens choose, or of the largest sum of weights

The last four are in the layers that E(a+b) condenses, so that nothing else differs.

All are loaded at once on two ranks and take turns, so that a machine that slows down meets all.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.condense_plot import ORIGINAL
from benchmarks.ranks import Together, all_times
from benchmarks.training import train_rank
from checkpoint_tools.condense import apply, merge
from checkpoint_tools.condense.apply import ApplyOptions, count_parameters
from checkpoint_tools.condense.experts import ExpertOptions, Ranking, ranked_experts, run_experts
from checkpoint_tools.condense.layers import Instead, LayerOptions, run_layers
from checkpoint_tools.condense.merge import MergeOptions
from checkpoint_tools.condense.published_json import Shape, read_weights, write_json
from checkpoint_tools.condense.weights import run_weights
from checkpoint_tools.conversion import How
from ep_engine import checkpoint
from ep_engine.config import RunConfig
from ep_engine.data.tokens import TokenFile
from ep_engine.inference.loaded_model import LoadedModel
from ep_engine.inference.perplexity import num_windows, window_losses
from ep_engine.ledger import Ledger
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.model_config import read_model_config
from ep_engine.parallelize import build, entries_of
from ep_engine.placement import Placement
from ep_engine.training.mfu import activated_parameters

RANKS = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arm:
    """One way to make the model smaller.

    Attributes:
        experts: that stay of a layer, beside the shared ones.
        instead: what becomes of a layer.
        merged: the experts are those that others are merged into.
        ranking: by which experts are chosen; None: by search.
        fitted: their weights are fitted.
    """

    experts: int = 0
    instead: Instead = "condensed"
    merged: bool = False
    ranking: Ranking | None = None
    fitted: bool = False

    @property
    def is_condensed(self) -> bool:
        """Whether there are condensed layers, which CD-MoE's fine-tuning trains alone."""
        return self.instead == "condensed" and not self.merged

    @property
    def follows(self) -> bool:
        """Whether it changes the layers of E(a+b), none of its own."""
        return self.merged or self.fitted or self.ranking is not None

    @property
    def name(self) -> str:
        """Of its files."""
        what = "merged" if self.merged else self.instead
        return f"{what}-{self.experts}{'-fitted' if self.fitted else ''}{f'-{self.ranking}' if self.ranking else ''}"


def arms_of(shared: int, top_k: int, merged: int) -> dict[str, Arm]:
    """The arms of a model with so many shared experts."""
    return {
        f"E({shared}+{top_k})": Arm(top_k),
        f"E({shared}+{top_k}) fitted": Arm(top_k, fitted=True),
        f"E({shared}+{top_k}) frequency": Arm(top_k, ranking="frequency"),
        f"E({shared}+{top_k}) mass": Arm(top_k, ranking="mass"),
        f"E({shared}+0)": Arm(),
        "layer drop": Arm(instead="layer-drop"),
        "block drop": Arm(instead="block-drop"),
        f"merged to {merged}": Arm(merged, merged=True),
    }


@dataclass(frozen=True)
class Made:
    """The files of the searches for one model, and the models that are made of it, in a folder."""

    folder: Path
    base: Path  # checkpoint
    corpus: Path  # documents, on all of which weights are counted
    max_length: int  # tokens of a text
    max_texts: int  # of them for all else

    def weights(self) -> Path:
        """Of all experts."""
        path = self.folder / "weights.json"
        if not path.is_file():
            run_weights(self.base, [self.corpus], path, max_length=self.max_length)
        return path

    def lists(self, experts: int, ranking: Ranking | None = None) -> Path:
        """The experts of every layer, by search, which fits weights too, or by a ranking."""
        path = self.folder / f"experts{f'-{ranking}' if ranking else ''}.json"
        if path.is_file():
            return path
        if ranking is None:
            options = ExpertOptions(experts, "js", self.max_length, self.max_texts, fit=self._fitted)
            run_experts(self.base, [self.corpus], self.weights(), path, options)
        else:
            weights = read_weights(self.weights(), Shape.of(read_model_config(self.base / "model.json")))
            write_json(path, {str(i): row for i, row in enumerate(ranked_experts(weights, ranking, experts))})
        return path

    @property
    def _fitted(self) -> Path:
        return self.folder / "weights-fitted.json"

    def order(self, arm: Arm, layers: int) -> Path:
        """Layers in the order in which they go, by search."""
        path = self.folder / f"layers-{arm.name}.json"
        if not path.is_file():
            options = LayerOptions(
                layers, arm.experts, instead=arm.instead, max_length=self.max_length, max_texts=self.max_texts
            )
            run_layers(self.base, [self.corpus], self._files(arm), path, options)
        return path

    def model(self, arm: Arm, layers: int, order: Path, *, keep_scales: bool = False) -> Path:
        """A checkpoint with so many layers changed; with weights apart from the last matrix if asked for."""
        out = self.folder / f"{arm.name}-{layers}{'-scales' if keep_scales else ''}"
        if (out / "model.json").is_file():
            return out
        if arm.merged:
            options = MergeOptions(arm.experts, layers, self.max_length, self.max_texts)
            conversion, _ = merge.prepare(self.base, out, [self.corpus], options, order)
        else:
            asked = ApplyOptions(layers, arm.experts, arm.instead, keep_scales)
            conversion = apply.prepare(self.base, out, asked, order, self._files(arm))
        conversion.run(How(overwrite=True))
        return out

    def _files(self, arm: Arm) -> tuple[Path | None, Path | None]:
        if not arm.experts:
            return None, None
        lists = self.lists(arm.experts, arm.ranking)
        return self._fitted if arm.fitted else self.weights(), lists


def sizes(folder: Path) -> dict[str, int]:
    """Parameters of a checkpoint: all, and those that a token is multiplied with."""
    config = read_model_config(folder / "model.json")
    return {"parameters": count_parameters(config), "activated_parameters": activated_parameters(config)}


def measure(rank: int, models: Mapping[str, Path], heldout: Path, rows: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Loss, bytes on the wire, and milliseconds of forwards of all models, in turn; every rank calls this.

    Args:
        rank: this one, of two.
        models: checkpoints by name, `ORIGINAL` among them.
        heldout: token file.
        rows: batches of held-out text, and rows of each, S tokens long.
        rounds: forwards of each that are timed.

    Returns:
        By name: `heldout_loss`, `bytes_per_token` (sent to the other rank in a forward), `ms` of every round with
        experts shared by two ranks, and `ms_apart` with all experts on each, where nothing is sent.
    """
    found: dict[str, Any] = {name: {} for name in models}
    text, length = TokenFile(heldout), read_model_config(models[ORIGINAL] / "model.json").max_position_embeddings
    batches, batch = rows
    batch_BS = _rows(text, range(rank, batch, RANKS), length)
    with torch.no_grad(), process_groups(World(rank=rank, size=RANKS), CPU, RANKS, 300.0) as meshes:
        loaded = {name: _loaded(folder, meshes, batch_BS.numel()) for name, folder in models.items()}
        for name, (model, ledger) in loaded.items():
            windows = range(num_windows(text, length, batches * batch * length, length))
            losses = model.share_out(
                windows, batch // RANKS, partial(_losses, model, text, length)
            )  # fmt: skip
            total = sum(loss for part in losses for loss in part)
            ledger.reset()
            model.model(batch_BS)
            sent = ledger.gathered(meshes.world).bytes_per_token()["total"]
            found[name] |= {"heldout_loss": total / (len(windows) * length), "bytes_per_token": sent}
        times = _in_turn({name: model for name, (model, _) in loaded.items()}, batch_BS, rounds)
    with torch.no_grad(), process_groups(World(rank=rank, size=RANKS), CPU, 1, 300.0) as meshes:
        apart = {name: _loaded(folder, meshes, batch_BS.numel())[0] for name, folder in models.items()}
        times_apart = _in_turn(apart, batch_BS, rounds)
    return {name: one | {"ms": times[name], "ms_apart": times_apart[name]} for name, one in found.items()}


def _loaded(folder: Path, meshes: Meshes, tokens: int) -> tuple[LoadedModel, Ledger]:
    config = read_model_config(folder / "model.json")
    experts = config.experts_of_layer()  # none where all layers are condensed
    placement = Placement.in_order(experts, meshes.experts["ep"].size()) if experts else None
    (model,), ledger = build(config, placement, meshes, device=CPU, dtype=torch.float32, tokens=tokens)
    checkpoint.load(folder, entries_of([model], experts=meshes.experts), group=meshes.world)
    return LoadedModel(model.eval(), config, meshes, CPU), ledger


def _losses(model: LoadedModel, text: TokenFile, length: int, own: list[int]) -> list[float]:
    return window_losses(model.model, text, own, length, CPU)


def _rows(text: TokenFile, windows: range, length: int) -> Tensor:
    return torch.from_numpy(np.stack([text.read(window * length, length) for window in windows]))


def _in_turn(models: Mapping[str, LoadedModel], batch_BS: Tensor, rounds: int) -> dict[str, list[float]]:
    calls = {name: Together(partial(model.model, batch_BS)) for name, model in models.items()}
    return all_times(calls, rounds=rounds)


def tune(rank: int, configs: list[RunConfig]) -> dict[str, Any]:
    """Train one run after the other; their checkpoints are not kept. Every rank calls this."""
    for config in configs:
        train_rank(rank, config)
        if rank == 0:
            shutil.rmtree(config.output.folder / "checkpoints")
    return {}


def speeds(times: list[float], original: list[float], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens per second, and how many times that of the original in the same round: median, least and largest.

    Args:
        times: milliseconds of every round.
        original: those of the original model.
        tokens: of a forward, on all ranks.
    """
    of_round = [tokens / ms * 1e3 for ms in times]
    ratios = [before / after for before, after in zip(original, times, strict=True)]
    return {
        name: {"median": median(values), "min": min(values), "max": max(values)}
        for name, values in (("tokens_per_second", of_round), ("speedup", ratios))
    }
