"""What the engine must know of a model family of Hugging Face: its config.json, and its name for every weight.

A family is one small file that fills in a `Family`. Entry names are the engine's, keys are Hugging Face's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from checkpoint_tools.families import rope
from checkpoint_tools.families.place import Place, Stacked
from ep_engine.entries import expected_entries
from ep_engine.errors import UserError
from ep_engine.model_config import CondensedLayer, ModelConfig, first_sentence

REQUIRED = object()
MAX_LAYERS = 100_000  # no model has more, and a list as long as a damaged file says would fill the memory
# Written by the family or from the weights, never carried along.
_WRITTEN = {"architectures", "model_type", "auto_map", "dtype", "torch_dtype"}
_UNWRITTEN = {"carried", "family", "initializer_range"}  # of ModelConfig: no config.json can lose them


@dataclass(frozen=True)
class Field:
    """One key of config.json that the engine reads."""

    key: str
    name: str  # of the field in ModelConfig, or in MoEConfig
    kind: type  # int: at least `least`; float: finite, not negative; bool
    default: Any = REQUIRED  # the family's own, when the key is missing or null
    nullable: bool = False  # null is a value, None, and not the same as a missing key
    least: int = 1
    other_key: str | None = None  # that some versions of transformers write in its place


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
)
SLIDING_WINDOW = Field("sliding_window", "sliding_window", int, None, nullable=True)
ATTENTION_BIAS = Field("attention_bias", "attention_bias", bool, False)


def with_defaults(*fields: Field, **defaults: Any) -> tuple[Field, ...]:
    """The fields of every decoder with other defaults, by key, and further fields."""
    own = tuple(replace(f, default=defaults.get(f.key, f.default)) for f in DECODER_FIELDS)
    return (*own, *fields)


Names = Mapping[str, str | Stacked]
"""Entry -> key, both without `.weight` and `.bias`; {i} is the layer, {e} the expert."""


@dataclass(frozen=True)
class Family:
    """One model family: a table of names and a table of config.json keys."""

    architecture: str
    model_type: str
    transformers_class: str | None  # module:class that computes its logits; None: transformers does not know it
    names: Callable[[ModelConfig], Names]
    fields: tuple[Field, ...] = (*DECODER_FIELDS, ATTENTION_BIAS)
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # key -> the one value computed, family default
    always: Mapping[str, Any] = field(default_factory=dict)  # fields of ModelConfig that all its models share
    rope_theta: float = 10000.0  # where config.json does not say
    more_keys: frozenset[str] = frozenset()  # keys that read_more reads and write_more writes
    read_more: Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]] | None = None  # -> fields of ModelConfig
    write_more: Callable[[ModelConfig], dict[str, Any]] | None = None
    is_ours: Callable[[Mapping[str, Any]], bool] = lambda _: True  # where families share an architecture
    own_name: str | None = None  # where families share a model_type
    ignores_rules: bool = True  # whether the code that runs its folders chooses experts by plain top-k, whatever we say
    modeling_files: tuple[str, ...] = ()  # of checkpoint_tools/hf_modeling, copied beside an export
    auto_map: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the family, in `--family`."""
        return self.own_name or self.model_type

    def places(self, config: ModelConfig) -> dict[str, Place]:
        """Where every entry of a model of this family lies, in the engine's order.

        Raises:
            UserError: the family has no name for an entry.
        """
        names = self.names(config)
        sizes = config.moe.expert_sizes if config.moe else None
        places = {}
        for entry in expected_entries(config):
            place = _place(names, entry)
            if place is None:
                raise UserError(f"{self.architecture} has no name for {entry}; the model cannot be exported to it")
            if sizes is not None and ".moe.experts." in entry:
                layer, expert = (int(part) for part in entry.split(".") if part.isdigit())
                place = replace(place, size=sizes[config.moe_index(layer)][expert])
            places[entry] = place
        return places

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
        values = read_fields(config, self.fields, where) | dict(self.always) | {"family": self.name}
        if values["num_layers"] > MAX_LAYERS:
            raise UserError(f"{where} speaks of {values['num_layers']} layers, more than {MAX_LAYERS}; correct it")
        values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
        if values.get("head_dim") is None:
            values["head_dim"] = _divided(values["hidden_size"], values["num_heads"], where)
        values["rope_theta"], values["rope_scaling"] = rope.read(config, where, self.rope_theta)
        read = {f.key for f in self.fields} | self.fixed.keys() | self.more_keys | rope.KEYS | _WRITTEN
        values["carried"] = {key: value for key, value in config.items() if key not in read}
        try:
            model = ModelConfig(**values)
            if self.read_more is not None:
                model = ModelConfig(**{**values, **self.read_more(config, model)})
        except ValidationError as error:
            raise UserError(f"{where}: {first_sentence(error)}") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return model

    def write_config(self, model: ModelConfig, dtype: str) -> dict[str, Any]:
        """config.json of a model, in the form that transformers 4.x and 5.x both read.

        Raises:
            UserError: the family cannot express something of the model, which is found by reading what was written.
        """
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        if self.auto_map:
            config["auto_map"] = dict(self.auto_map)
        config |= {f.key: getattr(model, f.name) for f in self.fields}
        config |= {key: only for key, (only, _) in self.fixed.items()}
        config |= rope.write(model)
        if self.write_more is not None:
            config |= self.write_more(model)
        config["torch_dtype"] = dtype
        config |= {key: value for key, value in model.carried.items() if key not in config}
        self._check_nothing_lost(model, config)
        return config

    def _check_nothing_lost(self, model: ModelConfig, config: Mapping[str, Any]) -> None:
        try:
            back = self.read_config(config, "its config.json")
        except UserError as error:
            raise UserError(f"{self.architecture} cannot express the model ({error})") from None
        pairs = {name: (getattr(model, name), getattr(back, name)) for name in ModelConfig.model_fields}
        # Of condensed layers, what multiplies something has to be there.
        pairs["condensed"] = (_with_factors(model), _with_factors(back))
        if model.moe is not None and back.moe is not None:
            del pairs["moe"], pairs["intermediate_size"]  # experts and dense layers have widths of their own
            parts = {"moe": (model.moe, back.moe), "routing": (model.moe.routing, back.moe.routing)}
            for at, (a, b) in parts.items():
                pairs |= {f"{at}.{name}": (value, getattr(b, name)) for name, value in a if name != "routing"}
        for name, (wanted, found) in pairs.items():
            if wanted != found and name not in _UNWRITTEN:
                raise UserError(
                    f"{self.architecture} cannot express {name} {_short(wanted)} of the model, it would be read as "
                    f"{_short(found)}; choose another family with --family"
                )


def _with_factors(model: ModelConfig) -> dict[int, CondensedLayer]:
    return {layer: one for layer, one in model.condensed.items() if one.gated or one.scales}


def with_our_code(family: Family, code: str, architecture: str, model_type: str) -> Family:
    """The family with our modeling file, `code`, which computes the rules of constrained routing as well."""
    module = "modeling_moe"
    fields = tuple(f for f in family.fields if f.name != "sliding_window")
    fixed = dict(family.fixed)
    if len(fields) < len(family.fields):
        fixed["sliding_window"] = (None, None)  # which our file does not have
    return replace(
        family,
        fields=fields,
        fixed=fixed,
        architecture=architecture,
        model_type=model_type,
        transformers_class=f"checkpoint_tools.hf_modeling.{module}:{code}ForCausalLM",
        own_name=family.name,
        ignores_rules=False,
        modeling_files=("configuration_moe.py", "modeling_moe.py", "selection.py"),
        auto_map={
            "AutoConfig": f"configuration_moe.{code}Config",
            "AutoModel": f"{module}.{code}Model",
            "AutoModelForCausalLM": f"{module}.{code}ForCausalLM",
        },
    )


def read_fields(config: Mapping[str, Any], fields: tuple[Field, ...], where: str) -> dict[str, Any]:
    """Values of the keys of some fields, by the names of the engine; UserError for one of the wrong kind."""
    return {f.name: _checked(config, f, where) for f in fields}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _place(names: Names, entry: str) -> Place | None:
    """Where one entry lies; None: the family has no name for it."""
    parts = entry.split(".")
    suffix = f".{parts.pop()}" if parts[-1] in ("weight", "bias") else ""
    numbers = [part for part in parts if part.isdigit()]
    placeholders = iter(("{i}", "{e}"))
    pattern = ".".join(next(placeholders) if part.isdigit() else part for part in parts)
    name, given = names.get(pattern), dict(zip("ie", numbers, strict=False))
    if name is None:  # a key that is an entry's, suffix and all
        name, suffix = names.get(pattern + suffix), ""
    if isinstance(name, Stacked):
        return Place(name.key.format(**given), index=int(given["e"]))
    return None if name is None else Place(name.format(**given) + suffix)


def _checked(config: Mapping[str, Any], f: Field, where: str) -> Any:
    """The value of a key if it is of the field's kind, the default if it is missing."""
    value = config.get(f.key)
    if value is None and f.other_key is not None:
        value = config.get(f.other_key)
    if value is None:
        if f.default is REQUIRED:
            raise UserError(f"{where} has no {f.key}; it is not the config.json of a complete model")
        return None if f.nullable and f.key in config else f.default
    if f.kind is bool:
        good, wanted = isinstance(value, bool), "true or false"
    elif f.kind is int:
        good, wanted = (
            isinstance(value, int) and not isinstance(value, bool) and value >= f.least,
            f"a whole number of at least {f.least}",
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
