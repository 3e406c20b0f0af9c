"""MoLlama (Dense2MoE): LLaMA whose chosen layers are upcycled; all experts of a layer in one transposed tensor.

It calls itself `llama`; `expert_top_k` in config.json tells it apart. Written with `first_init` false, so that its own
code builds the experts before it loads them.
"""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.families.family import (
    ATTENTION_BIAS,
    DECODER_FIELDS,
    Family,
    Field,
    Names,
    read_fields,
    with_our_code,
)
from checkpoint_tools.families.llama import DENSE_NAMES
from checkpoint_tools.families.mixture import WHERE, Pattern
from checkpoint_tools.families.place import Stacked
from checkpoint_tools.families.routing import ROUTING_KEYS, read_routing, write_routing
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig

_MLP = "model.layers.{i}.mlp"
_GATES = {"linear": "linear", "mlp": "mlp_gelu", "gmm": "cosine"}  # its names -> ours
_EXPERTS: Names = {
    "layers.{i}.moe.experts.{e}.w_gate": Stacked(f"{_MLP}.gate_proj.weight"),
    "layers.{i}.moe.experts.{e}.w_up": Stacked(f"{_MLP}.up_proj.weight"),
    "layers.{i}.moe.experts.{e}.w_down": Stacked(f"{_MLP}.down_proj.weight"),
}
_GATE_NAMES: Mapping[str, Names] = {
    "linear": {"layers.{i}.moe.router.w_in": f"{_MLP}.gate.w_gate.0.weight"},
    "mlp_gelu": {
        "layers.{i}.moe.router.w_in": f"{_MLP}.gate.w_gate.0.weight",
        "layers.{i}.moe.router.b_in": f"{_MLP}.gate.w_gate.0.bias",
        "layers.{i}.moe.router.w_out": f"{_MLP}.gate.w_gate.3.weight",
    },
    "cosine": {
        "layers.{i}.moe.router.w_in": f"{_MLP}.gate.w_gate.weight",
        "layers.{i}.moe.router.w_out": f"{_MLP}.gate.expert_centroids",
        "layers.{i}.moe.router.temperature": f"{_MLP}.gate.temperature",
    },
}


def _start_and_step(dense: list[int], num_layers: int) -> dict[str, Any]:
    sparse = [layer for layer in range(num_layers) if layer not in dense]
    return {"moe_start_layer": sparse[0], "moe_layer_freq": sparse[1] - sparse[0] if len(sparse) > 1 else num_layers}


_PATTERN = Pattern(
    {"moe_start_layer": 0, "moe_layer_freq": 1},
    lambda c, layer: layer >= c["moe_start_layer"] and (layer - c["moe_start_layer"]) % c["moe_layer_freq"] == 0,
    _start_and_step,
)
_FIELDS = (Field("num_experts", "num_experts", int, 2), Field("expert_top_k", "top_k", int, 1))
_GATING_SIZE = Field("gating_size", "gate_hidden_size", int, 256)


def _read(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    gate = config.get("gate_type") or "mlp"
    if not isinstance(gate, str) or gate not in _GATES:
        raise UserError(f"gate_type is {gate!r}, known are {', '.join(_GATES)}; correct the file")
    inside = 0 if gate == "linear" else read_fields(config, (_GATING_SIZE,), WHERE)["gate_hidden_size"]
    moe = MoEConfig(
        **read_fields(config, _FIELDS, WHERE),
        expert_hidden_size=model.intermediate_size,
        gate=_GATES[gate],
        gate_hidden_size=inside,
        score="softmax",
        routing=read_routing(config),
    )
    dense = _PATTERN.dense_layers(config, model.num_layers)
    return {"moe": moe, "dense_layers": dict.fromkeys(dense, model.intermediate_size)}


def _write(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe is None or model.is_dense:  # all layers condensed, perhaps
        raise UserError("MoLlama has experts in its layers, this model is dense; choose another family with --family")
    config = {f.key: getattr(moe, f.name) for f in _FIELDS}
    config |= {"gate_type": next((theirs for theirs, ours in _GATES.items() if ours == moe.gate), moe.gate)}
    if moe.gate_hidden_size:
        config[_GATING_SIZE.key] = moe.gate_hidden_size
    config |= {"first_init": False, "enable_moe": True, "intermediate_size": moe.expert_hidden_size}
    return config | _PATTERN.write(model) | write_routing(moe.routing)


_FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    transformers_class=None,
    names=lambda model: {**DENSE_NAMES, **_EXPERTS, **_GATE_NAMES.get(model.moe.gate if model.moe else "", {})},
    fields=(*DECODER_FIELDS, ATTENTION_BIAS),
    fixed={"hidden_act": ("silu", "silu"), "enable_moe": (True, True)},
    more_keys=frozenset({f.key for f in _FIELDS} | {"gate_type", "gating_size", "first_init"} | ROUTING_KEYS),
    read_more=_read,
    write_more=_write,
    is_ours=lambda config: "expert_top_k" in config,
    own_name="mollama",
)

MOLLAMA = with_our_code(_FAMILY, "MoLlama", _FAMILY.architecture, _FAMILY.model_type)
