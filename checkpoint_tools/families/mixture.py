"""The mixture of experts of families whose router is one matrix: Mixtral, Qwen-MoE, DeepSeekMoE, OLMoE."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.families.family import Field, Names, read_fields
from checkpoint_tools.families.routing import ROUTING_KEYS, read_routing, write_routing
from ep_engine.errors import UserError
from ep_engine.model_config import CondensedLayer, ModelConfig, MoEConfig

WHERE = "config.json"
CONDENSED = "condensed_layers"  # ours: layer, as text -> its width and what else CondensedLayer has


@dataclass(frozen=True)
class Pattern:
    """Which layers have experts.

    Attributes:
        defaults: keys of config.json and what they mean where they are missing.
        has_experts: of the values of the keys and a layer.
        choose: values for some dense layers, ascending, of so many; whether they fit shows when they are read again.
    """

    defaults: Mapping[str, Any]
    has_experts: Callable[[Mapping[str, Any], int], bool]
    choose: Callable[[list[int], int], dict[str, Any]]

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> list[int]:
        """Layers whose FFN is dense; UserError for a value of the wrong kind."""
        values = {key: default if config.get(key) is None else config[key] for key, default in self.defaults.items()}
        for key, value in values.items():
            of_numbers = isinstance(value, list) and all(isinstance(one, int) for one in value)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not (of_numbers if isinstance(self.defaults[key], list) else whole):
                raise UserError(f"{key} is {value!r}, which says of no layer whether it has experts; correct the file")
        if any(value == 0 for key, value in values.items() if key.endswith(("step", "freq"))):
            raise UserError("every 0th layer cannot have experts; correct decoder_sparse_step or moe_layer_freq")
        return [layer for layer in range(num_layers) if not self.has_experts(values, layer)]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The keys as they came with the model, if they still say the same, else others."""
        carried = {key: model.carried[key] for key in self.defaults if key in model.carried}
        dense = sorted(model.dense_layers)
        if carried and self.dense_layers(carried, model.num_layers) == dense:
            return carried
        return self.choose(dense, model.num_layers)


EVERY_LAYER = Pattern({}, lambda _, layer: True, lambda dense, _: {})
QWEN = Pattern(
    {"decoder_sparse_step": 1, "mlp_only_layers": []},
    lambda c, layer: layer not in c["mlp_only_layers"] and (layer + 1) % c["decoder_sparse_step"] == 0,
    lambda dense, _: {"decoder_sparse_step": 1, "mlp_only_layers": dense},
)
DEEPSEEK = Pattern(
    {"first_k_dense_replace": 0, "moe_layer_freq": 1},
    lambda c, layer: layer >= c["first_k_dense_replace"] and layer % c["moe_layer_freq"] == 0,
    lambda dense, _: {"first_k_dense_replace": len(dense), "moe_layer_freq": 1},
)


@dataclass(frozen=True)
class Mixture:
    """Keys of config.json.

    Attributes:
        fields: of MoEConfig, all but those below.
        renormalises: whether the weights of the chosen are divided by their sum; None: they always are.
        pattern: which layers have experts.
        shared_size: width of the shared expert; or of one of them, whose number `shared_count` is.
        shared_count: number of shared experts; None: one.
        shared_gate: whether the shared expert has a sigmoid gate.
    """

    fields: tuple[Field, ...]
    renormalises: Field | None = None
    pattern: Pattern = EVERY_LAYER
    shared_size: Field | None = None
    shared_count: Field | None = None
    shared_gate: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """All keys that are read and written, but those of the pattern, which are carried along as they were."""
        single = (self.renormalises, self.shared_size, self.shared_count)
        fields = [f for f in (*self.fields, *single) if f is not None]
        others = {f.other_key for f in fields if f.other_key is not None}
        return frozenset({f.key for f in fields} | others | ROUTING_KEYS | {CONDENSED})

    def read(self, config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
        """Fields of ModelConfig from config.json; UserError for a value of the wrong kind."""
        values = read_fields(config, self.fields, WHERE)
        renormalised = self.renormalises is None or read_fields(config, (self.renormalises,), WHERE)["renormalise"]
        shared = 0
        if self.shared_size is not None:
            count = 1
            if self.shared_count is not None:
                count = read_fields(config, (self.shared_count,), WHERE)["count"] or 0
            shared = count * read_fields(config, (self.shared_size,), WHERE)["shared_hidden_size"]
        dense = self.pattern.dense_layers(config, model.num_layers)
        widths, condensed = read_condensed(config.get(CONDENSED))
        moe = MoEConfig(
            **values,
            gate="linear",
            # Softmax over all, divided by the sum of the chosen, is softmax over the chosen.
            score="softmax_of_chosen" if renormalised else "softmax",
            shared_hidden_size=shared,
            shared_gate=self.shared_gate and shared > 0,
            routing=read_routing(config),
        )
        dense_layers = {**dict.fromkeys(dense, model.intermediate_size), **widths}
        return {"moe": moe, "dense_layers": dense_layers, "condensed": condensed}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json's keys; what they cannot say shows when they are read again."""
        moe = model.moe
        if moe is None:
            raise UserError("the family has experts in its layers, this model is dense; choose another with --family")
        config = {f.key: getattr(moe, f.name) for f in self.fields}
        if self.renormalises is not None:
            config[self.renormalises.key] = moe.score == "softmax_of_chosen"
        if self.shared_size is not None and self.shared_count is None:
            config[self.shared_size.key] = moe.shared_hidden_size
        elif self.shared_count is not None:
            config[self.shared_count.key] = moe.shared_hidden_size // moe.expert_hidden_size or None
        config |= write_condensed(model)
        dense = {layer: width for layer, width in model.dense_layers.items() if layer not in model.condensed}
        if dense:
            config["intermediate_size"] = next(iter(dense.values()))
        never_dense = model.model_copy(update={"dense_layers": dense})
        return config | self.pattern.write(never_dense) | write_routing(moe.routing)


def read_condensed(given: Any) -> tuple[dict[int, int], dict[int, CondensedLayer]]:
    """Widths and factors of condensed layers; UserError if that is not what the key says."""
    widths, condensed = {}, {}
    try:
        for layer, one in dict(given or {}).items():
            widths[int(layer)] = int(one["width"])
            condensed[int(layer)] = CondensedLayer(**{key: value for key, value in one.items() if key != "width"})
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{CONDENSED} must name layers, their widths and factors, got {reprlib.repr(given)}; correct the file"
        ) from None
    return widths, condensed


def write_condensed(model: ModelConfig) -> dict[str, Any]:
    """The key, if there is something to say."""
    if not model.condensed:
        return {}
    layers = sorted(model.condensed.items())
    return {CONDENSED: {str(i): {"width": model.dense_layers[i], **one.model_dump()} for i, one in layers}}


def mixture_names(at: str, gate: str, up: str, down: str) -> Names:
    """Names of a router and of experts below `at`, `...experts.{e}.<gate, up, down>.weight`."""
    moe = "layers.{i}.moe"
    return {
        f"{moe}.router.w_in": f"{at}.gate.weight",
        f"{moe}.experts.{{e}}.w_gate": f"{at}.experts.{{e}}.{gate}.weight",
        f"{moe}.experts.{{e}}.w_up": f"{at}.experts.{{e}}.{up}.weight",
        f"{moe}.experts.{{e}}.w_down": f"{at}.experts.{{e}}.{down}.weight",
    }
