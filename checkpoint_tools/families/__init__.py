"""The list of families, and which one a model belongs to."""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools import llama, llama_moe
from checkpoint_tools.family import Family
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig

FAMILIES = (llama.FAMILY, llama_moe.FAMILY)


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is missing."""
    named = config.get("architectures") or [config.get("model_type")]
    for family in FAMILIES:
        if named in ([family.architecture], [family.model_type]):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: architectures is {named!r}, known are {known}; this model cannot be read yet")


def family_of_model(model: ModelConfig) -> Family:
    """The family that a model of the engine is exported to."""
    return llama.FAMILY if model.moe is None else llama_moe.FAMILY
