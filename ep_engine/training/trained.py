"""Which weights a run trains: all, those of condensed layers, and none that a pattern freezes."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch

from ep_engine.errors import UserError
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig

Trainable = Literal["all", "condensed-experts"]
_OF_CONDENSED = ("w_gate.weight", "w_up.weight", "w_down.weight")


def frozen_weights(names: Iterable[str], config: ModelConfig, trainable: Trainable, freeze: Sequence[str]) -> set[str]:
    """Those of `names`, weights as modules have them, that a run leaves as they are.

    Args:
        names: such as `layers.0.moe.experts.w_down`, in which the experts of a rank are one.
        config: of the model.
        trainable: `condensed-experts`: of condensed layers the matrices, as CD-MoE's light fine-tuning
            (arXiv:2412.00069) does.
        freeze: patterns with * and ?.
    """
    kept = set()
    if trainable == "condensed-experts":
        kept = {f"layers.{layer}.ffn.{name}" for layer in config.condensed for name in _OF_CONDENSED}
    return {
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in freeze) or (trainable != "all" and name not in kept)
    }


def check_trained(config: ModelConfig, trainable: Trainable, freeze: Sequence[str]) -> None:
    """UserError if a pattern matches no weight of the model, or nothing is left to train."""
    if trainable == "all" and not freeze:
        return
    if trainable == "condensed-experts" and not config.condensed:
        raise UserError(
            "train.trainable is condensed-experts, and the model has 0 condensed layers; make them with "
            "`python -m checkpoint_tools condense`, or train all"
        )
    with torch.device("meta"):
        names = [name for name, weight in Decoder(config).named_parameters() if weight.requires_grad]
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = names[len(names) // 2]
            raise UserError(
                f"train.freeze {pattern!r} matches none of the model's {len(names)} weights, such as {example}; "
                "correct the pattern"
            )
    if len(frozen_weights(names, config, trainable, freeze)) == len(names):
        raise UserError(
            f"train.freeze {list(freeze)} and train.trainable {trainable} leave 0 of {len(names)} weights to train; "
            "freeze less"
        )


def freeze_weights(stages: Iterable[Decoder], trainable: Trainable, freeze: Sequence[str]) -> None:
    """Leave what is not trained out of the backward; before the first forward and the optimiser."""
    for stage in stages:
        weights = dict(stage.named_parameters())
        for name in frozen_weights(weights, stage.config, trainable, freeze):
            weights[name].requires_grad_(False)
