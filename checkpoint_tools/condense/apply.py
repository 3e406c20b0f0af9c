"""Step 3: condensed layers as what they are, dense SwiGLU of width (a + b) F; all else is copied.

    w_gate, w_up   rows of the shared experts, then of the b that stay
    w_down         their columns; those of expert e times its weight, unless weights are kept apart for fine-tuning
    shared_gate    Qwen's gate, by which the channels of the shared experts are multiplied before w_down

A layer may be dropped instead, its experts alone or the whole block, to compare with.

Letters:  a, b shared and other experts of a condensed layer   F hidden width of an expert
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.condense.layers import Instead, Kept, read_kept
from checkpoint_tools.condense.published_json import Shape, read_order
from checkpoint_tools.condense.unfinished import fingerprint
from checkpoint_tools.conversion import ToCheckpoint
from checkpoint_tools.source import Source, check_apart, open_source
from ep_engine.deferred import Deferred, Tensors
from ep_engine.entries import expected_entries
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, first_sentence

_NAMES = ("w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class ApplyOptions:
    """What is condensed, and how."""

    layers: int
    experts: int
    instead: Instead = "condensed"
    keep_scales: bool = False  # weights of experts stay apart from w_down


def prepare(
    source: Path, out: Path, options: ApplyOptions, order: Path, files: tuple[Path | None, Path | None]
) -> ToCheckpoint:
    """The model with its first layers in an order condensed, as an engine checkpoint.

    Args:
        source: Hugging Face folder or engine checkpoint with experts.
        out: checkpoint to write.
        options: how many layers and experts.
        order: file of layers.
        files: of weights and of lists of experts; None where none are needed.

    Raises:
        UserError: the model has no or fewer layers with experts, or a file is not of this model.
    """
    check_apart(source, out)
    model = open_source(source)
    shape = Shape.of(model.config)
    check_numbers(shape, options)
    kept = read_kept(files, shape, options.experts, options.instead)
    chosen = read_order(order, shape, options.layers)
    config = condensed_config(model.config, kept, chosen, keep_scales=options.keep_scales)
    tensors = _condensed_tensors(model, config, kept, chosen, keep_scales=options.keep_scales)
    largest = max(one.num_bytes for one in tensors.deferred.values())
    lists = [kept.experts[layer] for layer in chosen]
    factors = [kept.weight_LE[layer, row].tolist() for layer, row in zip(chosen, lists, strict=True)]
    return ToCheckpoint(
        source=model,
        out=out,
        tool="condense apply",
        options={**asdict(options), "order": chosen, "lists": lists, "weights": fingerprint(factors)},
        config=config,
        tensors=lambda _: tensors,
        same_names=False,  # layers and experts are counted anew
        held_bytes=3 * largest,  # in float32, and its parts
        compare=None,
    )


def check_numbers(shape: Shape, options: ApplyOptions) -> None:
    """UserError for more layers or experts than there are."""
    if not 1 <= options.layers <= shape.layers:
        raise UserError(
            f"--layers ({options.layers}) must be in 1..{shape.layers}, the model's layers with experts; choose fewer"
        )
    if not 0 <= options.experts <= shape.fewest:
        raise UserError(
            f"--experts ({options.experts}) must be in 0..{shape.fewest}, the experts of a layer; choose fewer"
        )


def condensed_config(
    config: ModelConfig, kept: Kept, chosen: Sequence[int], *, keep_scales: bool = False
) -> ModelConfig:
    """The configuration of the model with some layers, counted among those with experts, condensed.

    Raises:
        UserError: no layer would be left.
    """
    moe, layers = config.moe, config.moe_layers()
    assert moe is not None, "its shape was asked for"
    gone = {layers[index]: index for index in chosen}
    if kept.instead == "block-drop":
        return _without_blocks(config, gone)
    widths, condensed = {}, {}
    for layer, index in gone.items():
        experts = kept.experts[index]
        shared = moe.shared_hidden_size if kept.instead == "condensed" else 0
        widths[layer] = shared + len(experts) * moe.expert_hidden_size
        condensed[layer] = {
            "shared_size": shared,
            "gated": moe.shared_gate and shared > 0,
            "scales": [float(kept.weight_LE[index, e]) for e in experts] if keep_scales else [],
        }
    plain = config.model_dump() | {
        "dense_layers": config.dense_layers | widths,
        "condensed": {layer: one.model_dump() for layer, one in config.condensed.items()} | condensed,
    }
    return _checked(plain, config, set(gone.values()))


def _without_blocks(config: ModelConfig, gone: dict[int, int]) -> ModelConfig:
    stay = [layer for layer in range(config.num_layers) if layer not in gone]
    plain = config.model_dump() | {
        "num_layers": len(stay),
        "dense_layers": {i: config.dense_layers[layer] for i, layer in enumerate(stay) if layer in config.dense_layers},
        "condensed": {
            i: config.condensed[layer].model_dump() for i, layer in enumerate(stay) if layer in config.condensed
        },
    }
    return _checked(plain, config, set(gone.values()))


def _checked(plain: dict[str, Any], config: ModelConfig, gone: set[int]) -> ModelConfig:
    """With tables that have no rows for layers that are gone."""
    count = len(config.moe_layers())

    def rows(table: Any) -> Any:
        return [row for i, row in enumerate(table) if i not in gone] if isinstance(table, list) else table

    moe = plain["moe"]
    of_routing = ("top_t", "lists", "max_devices", "device_of_expert")
    for part, names in ((moe, ("score_scale", "expert_sizes", "experts_of_layer")), (moe["routing"], of_routing)):
        for name in names:
            part[name] = rows(part[name])
    if moe["experts_of_layer"]:
        moe["num_experts"] = max(moe["experts_of_layer"])
    if len(gone) == count:
        plain = _all_dense(plain)
    try:
        return ModelConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None


def _all_dense(plain: dict[str, Any]) -> dict[str, Any]:
    """No experts are left: a plain dense model if its layers are alike, else one of its family."""
    widths = set(plain["dense_layers"].values())
    factors = any(one["gated"] or one["scales"] for one in plain["condensed"].values())
    if not widths:
        raise UserError("--instead block-drop would leave no layer; choose fewer with --layers")
    if factors or len(widths) != 1 or 0 in widths:
        return plain
    return plain | {
        "moe": None, "dense_layers": {}, "condensed": {}, "intermediate_size": widths.pop(), "family": None
    }  # fmt: skip


def _condensed_tensors(
    model: Source, config: ModelConfig, kept: Kept, chosen: Sequence[int], *, keep_scales: bool
) -> Tensors:
    layers, known, whole = model.config.moe_layers(), model.tensors.deferred, model.hashed()
    gone = {layers[index]: index for index in chosen}
    stay = [layer for layer in range(model.config.num_layers) if layer not in gone or kept.instead != "block-drop"]
    deferred: dict[str, Deferred] = {}
    for entry in expected_entries(config):
        _, number, rest = entry.split(".", 2) if entry.startswith("layers.") else ("", "", "")
        layer = stay[int(number)] if number else -1
        was = f"layers.{layer}.{rest}" if number else entry
        if layer not in gone or not rest.startswith("ffn."):
            deferred[entry] = known[was]
        elif rest == "ffn.shared_gate.weight":
            deferred[entry] = known[f"layers.{layer}.moe.shared_gate.weight"]
        else:
            experts, index = kept.experts[gone[layer]], gone[layer]
            scales = [1.0 if keep_scales else float(kept.weight_LE[index, e]) for e in experts]
            deferred[entry] = _joined(model.config, whole, layer, rest.split(".")[1], experts, scales)
    return Tensors(deferred)


def _joined(
    config: ModelConfig, whole: Tensors, layer: int, name: str, experts: Sequence[int], scales: Sequence[float]
) -> Deferred:
    """One matrix of a condensed layer."""
    moe = config.moe
    assert moe is not None, "the layer has experts"
    at, dim = f"layers.{layer}.moe", 1 if name == "w_down" else 0
    parts = [f"{at}.shared.{name}.weight"] if moe.shared_hidden_size else []
    factors = [1.0] * len(parts) + (list(scales) if name == "w_down" else [1.0] * len(experts))
    parts += [f"{at}.experts.{e}.{name}" for e in experts]
    width = moe.shared_hidden_size + len(experts) * moe.expert_hidden_size
    dtype = whole.deferred[parts[0]].dtype

    def make() -> Tensor:
        # Rounded once, from a product in float32.
        return torch.cat([_scaled(whole[part], factor) for part, factor in zip(parts, factors, strict=True)], dim=dim)

    d = config.hidden_size
    return Deferred((d, width) if dim else (width, d), dtype, make)


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1.0 else (weight.float() * factor).to(weight.dtype)


@dataclass(frozen=True)
class Sizes:
    """What a condensed model would have, from configurations alone."""

    parameters: int
    parameters_before: int
    trainable: int  # of condensed layers, all but gates: what a light fine-tuning changes
    bytes: int

    @property
    def memory_ratio(self) -> float:
        """Of parameters, after and before."""
        return self.parameters / self.parameters_before

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "memory_ratio": self.memory_ratio}


def sizes(config: ModelConfig, options: ApplyOptions, order: Path | None, bytes_of: Callable[[int], int]) -> Sizes:
    """What is left.

    Args:
        config: of the model that is condensed.
        options: how many layers and experts.
        order: file of layers; not needed where all layers have equally many experts.
        bytes_of: bytes of so many parameters.

    Raises:
        UserError: there are not so many.
    """
    shape = Shape.of(config)
    check_numbers(shape, options)
    lists = [list(range(options.experts))] * shape.layers
    kept = Kept(lists, torch.ones(shape.layers, shape.experts, dtype=torch.float64), options.instead)
    if order is None and shape.each:
        raise UserError(f"the model has {shape}, so its size depends on --order; give it")
    chosen = list(range(options.layers)) if order is None else read_order(order, shape, options.layers)
    after = condensed_config(config, kept, chosen, keep_scales=options.keep_scales)
    count = count_parameters(after)
    layers = config.moe_layers()
    names = [f"layers.{layers[index]}.ffn.{name}.weight" for index in chosen for name in _NAMES]
    entries = expected_entries(after) if options.instead == "condensed" else {}
    trainable = sum(torch.Size(entries[name]).numel() for name in names if name in entries)
    return Sizes(count, count_parameters(config), trainable, bytes_of(count))


def count_parameters(config: ModelConfig) -> int:
    """Of all weights."""
    return sum(torch.Size(shape).numel() for shape in expected_entries(config).values())
