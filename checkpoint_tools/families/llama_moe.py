"""LLaMA-MoE v1 and C2R: the names and fields of the published models, with residual experts, and of classifiers.

Names: state dict of the released checkpoints. Fields `top_t` and `collaborative_list` are C2R's; `routing_rule`,
`max_devices`, `device_of_expert`, `num_groups`, `dense_layers` and `attention_output_bias` are ours and missing in
published files.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from checkpoint_tools.families.family import ATTENTION_BIAS, DECODER_FIELDS, Family, Field, Names, read_fields
from checkpoint_tools.families.llama import DENSE_NAMES
from checkpoint_tools.families.mixture import WHERE
from checkpoint_tools.families.routing import ROUTING_KEYS, read_routing, write_routing
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig

_MLP = "model.layers.{i}.mlp"
_FIELDS = (
    Field("num_experts", "num_experts", int, 16),
    Field("num_selects", "top_k", int, 4),
    Field("gate_add_noise", "gate_noise", bool, True),
    Field("add_weight_norm", "learned_scale", bool, False),
)
_SOFTMAX = Field("gate_use_softmax", "softmax", bool, True)
_RESIDUAL_FIELDS = (
    Field("intermediate_size_moe", "moe_size", int, 9632),
    Field("intermediate_size_residual", "residual_size", int, 1376),
    Field("num_experts_residual", "residual_experts", int, 2),
    Field("score_scale_factor_residual", "residual_scale", float, 1.0),
    Field("use_weighting", "residual_weighting", bool, False),
)


def _moe_names(model: ModelConfig, at: str) -> Names:
    """Names of a router and of experts below `at`; the gate's depend on its kind."""
    gate = model.moe.gate if model.moe else ""
    experts: Names = {
        "layers.{i}.moe.experts.{e}.w_gate": f"{at}.calculator.experts.weight_gate.{{e}}",
        "layers.{i}.moe.experts.{e}.w_up": f"{at}.calculator.experts.weight_up.{{e}}",
        "layers.{i}.moe.experts.{e}.w_down": f"{at}.calculator.experts.weight_down.{{e}}",
        "layers.{i}.moe.router.w_noise": f"{at}.gate.weight_noise.weight",
        "layers.{i}.moe.router.scale": f"{at}.calculator.mlp_norm.weight",
    }
    w_in = f"{at}.gate.gate_network.weight" if gate == "linear" else f"{at}.gate.gate_network.0.weight"
    w_out = {"layers.{i}.moe.router.w_out": f"{at}.gate.gate_network.2.weight"} if gate == "mlp" else {}
    return {**DENSE_NAMES, **experts, "layers.{i}.moe.router.w_in": w_in, **w_out}


def _residual_names(model: ModelConfig) -> Names:
    at = f"{_MLP}.residual_block"
    return {
        **_moe_names(model, f"{_MLP}.moe_layer"),
        "layers.{i}.moe.residual.gate": f"{at}.gate.gate_network",
        "layers.{i}.moe.residual_weighting": f"{_MLP}.weighting_network.0",
        # Bare parameters: their keys have no `.weight`.
        "layers.{i}.moe.residual.each.{e}.w_gate.weight": f"{at}.calculator.experts.weight_gate.{{e}}",
        "layers.{i}.moe.residual.each.{e}.w_up.weight": f"{at}.calculator.experts.weight_up.{{e}}",
        "layers.{i}.moe.residual.each.{e}.w_down.weight": f"{at}.calculator.experts.weight_down.{{e}}",
    }


def _read(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Fields of ModelConfig; UserError for a value of the wrong kind or sizes that do not add up."""
    return _read_moe(config, model, model.intermediate_size, {})


def _read_residual(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    given = read_fields(config, _RESIDUAL_FIELDS, WHERE)
    moe_size, residual_size = given.pop("moe_size"), given.pop("residual_size")
    count = given["residual_experts"]
    if moe_size + residual_size != model.intermediate_size or residual_size % count:
        raise UserError(
            f"intermediate_size_moe ({moe_size}) and intermediate_size_residual ({residual_size}), in {count} equal "
            f"experts, must add up to intermediate_size ({model.intermediate_size}); correct the file"
        )
    size = residual_size // count
    given_sizes = config.get("size_experts_residual")
    if given_sizes is not None and given_sizes != [[size] * count] * model.num_layers:
        raise UserError(
            f"size_experts_residual must be {size} for each of {count} residual experts in every layer, got "
            f"{str(given_sizes)[:60]}; unequal ones cannot be read"
        )
    return _read_moe(config, model, moe_size, {**given, "residual_hidden_size": size})


def _read_moe(
    config: Mapping[str, Any], model: ModelConfig, moe_size: int, residual: Mapping[str, Any]
) -> dict[str, Any]:
    values = read_fields(config, _FIELDS, WHERE)
    dense = _dense_layers(config.get("dense_layers"))
    sizes = _expert_sizes(config.get("size_experts"), values["num_experts"], model.num_layers - len(dense), moe_size)
    largest = max(max(row) for row in sizes)
    equal = all(size == largest for row in sizes for size in row)
    experts = [len(row) for row in sizes]
    moe = MoEConfig(
        **values,
        experts_of_layer=experts if len(set(experts)) > 1 else None,
        **residual,
        expert_hidden_size=largest,
        expert_sizes=None if equal else sizes,
        gate=config.get("gate_network", "mlp"),
        score="softmax_of_chosen" if read_fields(config, (_SOFTMAX,), WHERE)["softmax"] else "logit",
        score_scale=_scale(config.get("score_scale_factor", 1.0)),
        routing=read_routing(config),
    )
    outer = config.get("attention_output_bias", True)
    bias: bool | str = "qkv" if model.attention_bias is True and outer is False else model.attention_bias
    return {"moe": moe, "dense_layers": dense, "attention_bias": bias}


def _scale(scale: Any) -> float | list[float]:
    each = scale if isinstance(scale, list) else [scale]
    numbers = (isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in each)
    if not each or not all(numbers):
        raise UserError(
            f"score_scale_factor must be a number, or a list with one for every layer, got {scale!r}; correct the file"
        )
    return scale if isinstance(scale, list) else float(scale)


def _dense_layers(given: Any) -> dict[int, int]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(k.isdigit() and isinstance(v, int) for k, v in given.items()):
        raise UserError(f"dense_layers must name layers and the widths of their FFNs, got {given!r}; correct the file")
    return {int(layer): width for layer, width in given.items()}


def _expert_sizes(given: Any, num_experts: int, num_layers: int, total: int) -> list[list[int]]:
    """[L][E] from `size_experts`, or equal shares of the width of all experts for null."""
    if given is None:
        if total % num_experts:
            raise UserError(
                f"num_experts ({num_experts}) must divide their width ({total}) where size_experts is not given; "
                "correct the file"
            )
        return [[total // num_experts] * num_experts] * num_layers
    rows = given if isinstance(given, list) and len(given) == num_layers else []
    whole = (isinstance(row, list) and row and all(isinstance(n, int) and n >= 1 for n in row) for row in rows)
    full = rows and all(whole) and max(len(row) for row in rows) == num_experts
    # A layer of fewer experts (a pyramid, which published files do not have) is narrower.
    if not full or any(sum(row) > total or (len(row) == num_experts and sum(row) != total) for row in rows):
        raise UserError(
            f"size_experts must have {num_layers} rows of {num_experts} sizes that add up to {total}, got "
            f"{str(given)[:60]}; correct the file"
        )
    return rows


def _write(model: ModelConfig) -> dict[str, Any]:
    """The keys that `_read` reads."""
    moe = model.moe
    if moe is None or model.is_dense:
        raise UserError("LLaMA-MoE has experts in its layers, this model is dense; choose another family with --family")
    equal = [[moe.expert_hidden_size] * experts for experts in model.experts_of_layer()]
    sizes = moe.expert_sizes or equal
    config: dict[str, Any] = {f.key: getattr(moe, f.name) for f in _FIELDS}
    config |= {
        "intermediate_size": max(map(sum, sizes)),
        "size_experts": sizes,
        "gate_network": moe.gate,
        "gate_use_softmax": moe.score != "logit",
        "score_scale_factor": moe.score_scale,
        "attention_bias": bool(model.attention_bias),
    }
    if model.attention_bias == "qkv":
        config["attention_output_bias"] = False
    if 0 in model.dense_layers.values():
        raise UserError("LLaMA-MoE has an FFN or experts in every layer, this model has layers without; keep it here")
    if model.dense_layers:
        config["dense_layers"] = {str(layer): width for layer, width in sorted(model.dense_layers.items())}
    return config | {"routing_rule": moe.routing.rule} | write_routing(moe.routing)


def _write_residual(model: ModelConfig) -> dict[str, Any]:
    config, moe = _write(model), model.moe
    assert moe is not None, "just written"
    residual = moe.residual_experts * moe.residual_hidden_size
    return config | {
        "intermediate_size_moe": config["intermediate_size"],
        "intermediate_size_residual": residual,
        "intermediate_size": config["intermediate_size"] + residual,
        "num_experts_residual": moe.residual_experts,
        "score_scale_factor_residual": moe.residual_scale,
        "use_weighting": moe.residual_weighting,
    }


_FIXED = {
    "hidden_act": ("silu", "silu"),
    "gate_type": ("TopKBalancedNoisyGate", "TopKBalancedNoisyGate"),
    "calculator_type": ("UniversalCalculator", "UniversalCalculator"),
    "multiply_gate_scores": (True, True),
}
_MODELING = "checkpoint_tools.hf_modeling.modeling_llama_moe"

LLAMA_MOE = Family(
    architecture="LlamaMoEForCausalLM",
    model_type="llama_moe",
    transformers_class=f"{_MODELING}:LlamaMoEForCausalLM",
    names=lambda model: _moe_names(model, _MLP),
    fields=(*DECODER_FIELDS, ATTENTION_BIAS),
    fixed=_FIXED,
    more_keys=frozenset(
        {f.key for f in (*_FIELDS, _SOFTMAX)}
        | {"size_experts", "gate_network", "score_scale_factor", "dense_layers", "attention_output_bias"}
        | ROUTING_KEYS
    ),
    read_more=_read,
    write_more=_write,
    ignores_rules=False,
    modeling_files=("configuration_llama_moe.py", "modeling_llama_moe.py", "selection.py"),
    auto_map={
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModel": "modeling_llama_moe.LlamaMoEModel",
        "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEForCausalLM",
    },
)

LLAMA_MOE_RESIDUAL = replace(
    LLAMA_MOE,
    architecture="LlamaMoEResidualForCausalLM",
    model_type="llama_moe_residual",
    transformers_class=f"{_MODELING}:LlamaMoEResidualForCausalLM",
    names=_residual_names,
    fixed={
        **_FIXED,
        "gate_use_softmax_residual": (True, True),
        "multiply_gate_scores_residual": (True, True),
        "add_weight_norm": (False, False),
    },
    more_keys=LLAMA_MOE.more_keys | {f.key for f in _RESIDUAL_FIELDS} | {"size_experts_residual"},
    read_more=_read_residual,
    write_more=_write_residual,
    auto_map={
        "AutoConfig": "configuration_llama_moe.LlamaMoEResidualConfig",
        "AutoModel": "modeling_llama_moe.LlamaMoEResidualModel",
        "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEResidualForCausalLM",
    },
)


def _classifier(family: Family) -> Family:
    """The same with a head of labels, `score`, in the place of that of the vocabulary."""
    name = family.architecture.removesuffix("ForCausalLM")
    assert family.read_more is not None and family.write_more is not None  # noqa: PT018
    read, write = family.read_more, family.write_more

    def read_more(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # transformers' default
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"num_labels must be a whole number of at least 1, got {count!r}; correct the file")
        return {**read(config, model), "num_labels": count}

    def write_more(model: ModelConfig) -> dict[str, Any]:
        return {**write(model), "num_labels": model.num_labels}

    return replace(
        family,
        architecture=f"{name}ForSequenceClassification",
        own_name=f"{family.model_type}_classifier",
        transformers_class=f"{_MODELING}:{name}ForSequenceClassification",
        names=lambda model: {**family.names(model), "head": "score"},
        more_keys=family.more_keys | {"num_labels"},
        read_more=read_more,
        write_more=write_more,
        auto_map={
            **{auto: code for auto, code in family.auto_map.items() if auto != "AutoModelForCausalLM"},
            "AutoModelForSequenceClassification": f"modeling_llama_moe.{name}ForSequenceClassification",
        },
    )


CLASSIFIERS = (_classifier(LLAMA_MOE), _classifier(LLAMA_MOE_RESIDUAL))
