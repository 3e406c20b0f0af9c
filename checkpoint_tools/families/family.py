"""What the engine must know of a model family of Hugging Face: its config.json, and its name for every weight.

A family is one small file that fills in a `Family`. Entry names are the engine's, keys are Hugging Face's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from checkpoint_tools import rope
from ep_engine.entries import expected_entries
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, first_sentence

REQUIRED = object()
# Written by the family or from the weights, never carried along.
_WRITTEN = {"architectures", "model_type", "auto_map", "dtype", "torch_dtype"}


@dataclass(frozen=True)
class Field:
    """One key of config.json that the engine reads."""

    key: str
    name: str  # of the field in ModelConfig
    kind: type  # int: at least 1; float: finite, not negative; bool
    default: Any = REQUIRED  # the family's own, when the key is missing or null


# What every decoder of the LLaMA kind has; the defaults are those of transformers' LlamaConfig.
DECODER_FIELDS = (
    Field("vocab_size", "vocab_size", int),
    Field("hidden_size", "hidden_size", int),
    Field("intermediate_size", "intermediate_size", int),
    Field("num_hidden_layers", "num_layers", int),
    Field("num_attention_heads", "num_heads", int),
    Field("num_key_value_heads", "num_kv_heads", int, None),  # as many as query heads
    Field("head_dim", "head_dim", int, None),  # hidden_size / num_attention_heads
    Field("max_position_embeddings", "max_position_embeddings", int, 2048),
    Field("rms_norm_eps", "rms_norm_eps", float, 1e-6),
    Field("initializer_range", "initializer_range", float, 0.02),
    Field("tie_word_embeddings", "tie_embeddings", bool, False),
    Field("attention_bias", "attention_bias", bool, False),
)


@dataclass(frozen=True)
class Family:
    """One model family: a table of names and a table of config.json keys."""

    architecture: str
    model_type: str
    transformers_class: str  # module:class that computes its logits
    names: Callable[
        [ModelConfig], Mapping[str, str]
    ]  # entry -> key; {i} layer, {e} expert; `.weight`, `.bias` left off
    fields: tuple[Field, ...] = DECODER_FIELDS
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # key -> the one value computed, family default
    moe_keys: frozenset[str] = frozenset()  # keys that read_moe reads and write_moe writes
    read_moe: Callable[[Mapping[str, Any], ModelConfig], MoEConfig] | None = None
    write_moe: Callable[[ModelConfig, MoEConfig], dict[str, Any]] | None = None
    modeling_files: tuple[str, ...] = ()  # of checkpoint_tools/hf_modeling, copied beside an export
    auto_map: Mapping[str, str] = field(default_factory=dict)

    def keys(self, config: ModelConfig) -> dict[str, str]:
        """The key of every entry of a model of this family, in the engine's order.

        Raises:
            UserError: the family has no name for an entry.
        """
        names = self.names(config)
        keys = {entry: _key(names, entry) for entry in expected_entries(config)}
        for entry, key in keys.items():
            if key is None:
                raise UserError(f"{self.architecture} has no name for {entry}; the model cannot be exported to it")
        return {entry: key for entry, key in keys.items() if key is not None}

    def read_config(self, config: Mapping[str, Any], where: str) -> ModelConfig:
        """ModelConfig of a config.json of this family; keys it does not read are carried.

        Raises:
            UserError: a value is missing, out of range, or asks for what the engine does not compute.
        """
        for key, (only, default) in self.fixed.items():
            value = config.get(key, default)
            if value != only:
                raise UserError(
                    f"{where}: {key} is {value!r}, the engine computes only {only!r}; it cannot read this model"
                )
        values = {f.name: _checked(config.get(f.key), f, where) for f in self.fields}
        values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
        if values["head_dim"] is None:
            values["head_dim"] = _divided(values["hidden_size"], values["num_heads"], where)
        values["rope_theta"], values["rope_scaling"] = rope.read(config, where)
        read = {f.key for f in self.fields} | self.fixed.keys() | self.moe_keys | rope.KEYS | _WRITTEN
        values["carried"] = {key: value for key, value in config.items() if key not in read}
        try:
            model = ModelConfig(**values)
            if self.read_moe is not None:
                model = ModelConfig(**{**values, "moe": self.read_moe(config, model)})
        except ValidationError as error:
            raise UserError(f"{where}: {first_sentence(error)}") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return model

    def write_config(self, model: ModelConfig, dtype: str) -> dict[str, Any]:
        """config.json of a model, in the form that transformers 4.x and 5.x both read."""
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        if self.auto_map:
            config["auto_map"] = dict(self.auto_map)
        config |= {f.key: getattr(model, f.name) for f in self.fields}
        config |= {key: only for key, (only, _) in self.fixed.items()}
        config |= rope.write(model)
        if self.write_moe is not None and model.moe is not None:
            config |= self.write_moe(model, model.moe)
        config["torch_dtype"] = dtype
        return config | {key: value for key, value in model.carried.items() if key not in config}


def _key(names: Mapping[str, str], entry: str) -> str | None:
    """The key of one entry; None: the family has no name for it."""
    parts = entry.split(".")
    suffix = f".{parts.pop()}" if parts[-1] in ("weight", "bias") else ""
    numbers = [part for part in parts if part.isdigit()]
    placeholders = iter(("{i}", "{e}"))
    pattern = ".".join(next(placeholders) if part.isdigit() else part for part in parts)
    name = names.get(pattern)
    return None if name is None else name.format(**dict(zip("ie", numbers, strict=False))) + suffix


def _checked(value: Any, f: Field, where: str) -> Any:
    """`value` if it is of the field's kind, the default if it is missing."""
    if value is None:
        if f.default is REQUIRED:
            raise UserError(f"{where} has no {f.key}; it is not the config.json of a complete model")
        return f.default
    if f.kind is bool:
        good, wanted = isinstance(value, bool), "true or false"
    elif f.kind is int:
        good, wanted = (
            isinstance(value, int) and not isinstance(value, bool) and value >= 1,
            "a whole number of at least 1",
        )
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good, wanted = number and math.isfinite(value) and value >= 0, "a number that is not negative"
    if not good:
        raise UserError(f"{where}: {f.key} must be {wanted}, got {value!r}; correct the file")
    return value


def _divided(hidden_size: int, num_heads: int, where: str) -> int:
    if hidden_size % num_heads:
        raise UserError(
            f"{where}: num_attention_heads ({num_heads}) must divide hidden_size ({hidden_size}) where head_dim "
            "is not given; correct the file"
        )
    return hidden_size // num_heads
