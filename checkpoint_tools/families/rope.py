"""Rotary position embeddings in config.json: what transformers 4.x and 5.x write, and the form both read.

4.x writes `rope_theta` and `rope_scaling`, 5.x one dictionary `rope_parameters`; 5.x still reads what 4.x wrote.
"""

import math
from collections.abc import Mapping
from typing import Any

from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig

KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read(config: Mapping[str, Any], where: str, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling of ModelConfig; UserError for a type or value the engine does not know."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: rope_scaling must be a dictionary, got {given!r}; correct the file")
    scaling = dict(given)
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)  # the name that rope_type had before transformers 4.43
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or default_theta
    partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if not isinstance(kind, str) or kind not in _PARAMETERS:
        raise UserError(
            f"{where}: rope type {kind!r} is not known, the engine computes {', '.join(_PARAMETERS)}; "
            "it cannot read this model"
        )
    if partial != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor is {partial!r}, the engine computes only 1.0; it cannot read this model"
        )
    for name, value in [("rope_theta", theta), *((name, scaling.get(name)) for name in _PARAMETERS[kind])]:
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(
                f"{where}: {name} must be a positive number for rope type {kind}, got {value!r}; correct the file"
            )
    return float(theta), {"rope_type": kind, **scaling} if kind != "default" else None


def write(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    scaling = {} if model.rope_scaling is None else {"rope_scaling": model.rope_scaling}
    return {"rope_theta": model.rope_theta, **scaling}
