"""The three files of a condensation, as CD-MoE publishes them, so that theirs and ours are exchangeable.

    weights    {"l-e": [sum, count, sum / count], ...}    of expert e in MoE layer l; counts of tokens that chose it
    experts    {"0": [e, ...], ...}                       of every MoE layer, the most useful first
    order      [l, ...]                                   MoE layers, the first to be condensed first

Layers are counted among those with experts. Each is refused if it is not of the model that it is used with.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, in_words
from ep_engine.output import whole_file

_TOLERANCE = 1e-9  # of sum / count, beside what is written as their quotient
_LARGEST = 1 << 53  # count that float64 holds exactly; no run has as many tokens


@dataclass(frozen=True)
class Shape:
    """What a file must fit."""

    layers: int  # with experts
    experts: int  # of the layer with most
    top_k: int
    each: tuple[int, ...] = ()  # experts of every layer, where they have different numbers

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        """Of a model; UserError if it has no experts, or residual ones."""
        if config.moe is None or config.is_dense:
            raise UserError("the model has no layers with experts, so there is nothing to condense; give another")
        if config.moe.residual_experts:
            raise UserError(
                f"the model weighs {config.moe.residual_experts} residual experts by a gate of their own, which a "
                "dense layer has no place for; give a model without"
            )
        each = tuple(config.experts_of_layer()) if config.moe.experts_of_layer else ()
        return cls(len(config.moe_layers()), config.moe.num_experts, config.moe.top_k, each)

    def experts_in(self, layer: int) -> int:
        """Experts of one layer."""
        return self.each[layer] if self.each else self.experts

    @property
    def fewest(self) -> int:
        """Experts of the layer with fewest."""
        return min(self.each, default=self.experts)

    def __str__(self) -> str:
        return in_words([self.experts_in(layer) for layer in range(self.layers)])


@dataclass(frozen=True)
class Weights:
    """How often experts are chosen, and with what weight."""

    sum_LE: Tensor  # float64
    count_LE: Tensor  # int64

    @property
    def means(self) -> Tensor:
        """(L, E) float64: mean weight of an expert over the tokens that choose it; NaN of one that nobody chose."""
        return self.sum_LE / self.count_LE


def write_weights(path: Path, weights: Weights, shape: Shape) -> None:
    """Every pair, also of an expert that no token chose: [0.0, 0, 0.0]."""
    found = {}
    for layer, counts in enumerate(weights.count_LE.tolist()):
        for expert, count in enumerate(counts[: shape.experts_in(layer)]):
            total = float(weights.sum_LE[layer, expert])
            found[f"{layer}-{expert}"] = [total, count, total / count if count else 0.0]
    write_json(path, found)


def read_weights(path: Path, shape: Shape) -> Weights:
    """The file of weights.

    Raises:
        UserError: it is damaged or of another model: a pair is missing or strange, layers differ in their totals, or
            these are no multiples of top_k.
    """
    found = _read(path, dict, "an object of layer-expert pairs")
    wanted = [f"{layer}-{expert}" for layer in range(shape.layers) for expert in range(shape.experts_in(layer))]
    missing, strange = [key for key in wanted if key not in found], sorted(found.keys() - set(wanted))
    if missing:
        raise UserError(f"{path} lacks {_some(missing)}, the model has {shape}; make it with this model")
    if strange:
        raise UserError(f"{path} has {_some(strange)}, the model has {shape}; make it with this model")
    for key, value in found.items():
        good = isinstance(value, list) and len(value) == 3 and all(_is_number(one) for one in value)
        if not good or value[1] < 0 or value[1] != int(value[1]) or not _is_mean(*value):
            raise UserError(f"{path}: {key} is {value!r}, expected [sum, count, sum / count]; make it again")
    rows = torch.zeros(shape.layers, shape.experts, 2, dtype=torch.float64)  # what a layer has not, nobody chose
    for key in wanted:
        layer, expert = map(int, key.split("-"))
        rows[layer, expert] = torch.tensor(found[key][:2], dtype=torch.float64)
    counts = rows[..., 1].long()
    totals = counts.sum(dim=1)
    if (totals != totals[0]).any() or totals[0] == 0 or totals[0] % shape.top_k:
        raise UserError(
            f"{path} counts {int(totals.min())} to {int(totals.max())} choices in a layer, all must have equally many, "
            f"a multiple of top_k ({shape.top_k}); make it with this model"
        )
    return Weights(rows[..., 0], counts)


def read_experts(path: Path, shape: Shape, count: int) -> list[list[int]]:
    """The first `count` experts of every layer.

    Raises:
        UserError: the file is damaged or of another model, or has fewer.
    """
    found = _read(path, dict, "an object of lists by layer")
    if found.keys() != {str(layer) for layer in range(shape.layers)}:
        raise UserError(
            f"{path} has lists of {len(found)} layers ({_some(sorted(found))}), the model has layers with experts "
            f"0..{shape.layers - 1}; make it with this model"
        )
    for layer, experts in found.items():
        _check_ids(experts, shape.experts_in(int(layer)), f"{path}: list of layer {layer}", "experts")
        if len(experts) < count:
            raise UserError(
                f"{path}: list of layer {layer} has {len(experts)} experts, --experts is {count}; search for so many, "
                "or choose fewer"
            )
    return [found[str(layer)][:count] for layer in range(shape.layers)]


def read_order(path: Path, shape: Shape, count: int) -> list[int]:
    """The first `count` layers.

    Raises:
        UserError: the file is damaged or of another model, or has fewer.
    """
    found: list[int] = _read(path, list, "a list of layers")
    _check_ids(found, shape.layers, str(path), "layers with experts")
    if len(found) < count:
        raise UserError(f"{path} has {len(found)} layers, --layers is {count}; search for so many, or choose fewer")
    return found[:count]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(json.dumps(value) + "\n")


def _check_ids(ids: Any, count: int, where: str, what: str) -> None:
    whole = isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if not whole or any(not 0 <= one < count for one in ids) or len(set(ids)) < len(ids):
        raise UserError(f"{where} must name distinct {what} in 0..{count - 1}, got {ids!r}; make it with this model")


def _is_number(value: Any) -> bool:
    # Neither NaN nor infinite, nor an integer that no float can hold, of which math.isfinite would raise.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_mean(total: float, count: float, mean: float) -> bool:
    if count == 0:
        return total == 0
    return abs(mean - total / count) <= _TOLERANCE * max(1.0, abs(mean))


def _read(path: Path, kind: type, what: str) -> Any:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its name") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}); copy it again") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold {what}, got {type(value).__name__}; give another file")
    return value


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more" if keys else "none"
