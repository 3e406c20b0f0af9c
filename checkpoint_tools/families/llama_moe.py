"""LLaMA-MoE v1 and C2R: the names and fields of the published models, without residual experts.

Names: state dict of the released checkpoints. Fields `top_t` and `collaborative_list` are C2R's; `routing_rule`,
`max_devices`, `device_of_expert` and `num_groups` are ours and missing in published files.
"""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.family import Family
from checkpoint_tools.llama import ATTENTION_NAMES
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig

_MLP = "model.layers.{i}.mlp"
_NAMES = ATTENTION_NAMES | {
    "layers.{i}.moe.experts.{e}.w_gate": f"{_MLP}.calculator.experts.weight_gate.{{e}}",
    "layers.{i}.moe.experts.{e}.w_up": f"{_MLP}.calculator.experts.weight_up.{{e}}",
    "layers.{i}.moe.experts.{e}.w_down": f"{_MLP}.calculator.experts.weight_down.{{e}}",
}
_GATE_NAMES = {
    "linear": {"layers.{i}.moe.router.w_in": f"{_MLP}.gate.gate_network.weight"},
    "mlp": {
        "layers.{i}.moe.router.w_in": f"{_MLP}.gate.gate_network.0.weight",
        "layers.{i}.moe.router.w_out": f"{_MLP}.gate.gate_network.2.weight",
    },
}


def names(model: ModelConfig) -> dict[str, str]:
    """Entry -> key; the gate's keys depend on its kind."""
    assert model.moe is not None, "a model of this family has MoE layers"
    return _NAMES | _GATE_NAMES[model.moe.gate]


def read_moe(config: Mapping[str, Any], model: ModelConfig) -> MoEConfig:
    """The MoE part of config.json.

    Raises:
        UserError: experts of unequal size, a scale per layer, or a value of the wrong kind.
    """
    num_experts, top_k = config.get("num_experts", 16), config.get("num_selects", 4)
    for key, value in (("num_experts", num_experts), ("num_selects", top_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key} must be a whole number of at least 1, got {value!r}; correct the file")
    scale = config.get("score_scale_factor", 1.0)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise UserError(
            f"score_scale_factor must be one number, got {scale!r}; a factor per layer is not supported yet"
        )
    lists = config.get("collaborative_list")
    rule = config.get("routing_rule") or ("topk" if lists is None else "c2r")
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_hidden_size=_expert_size(config.get("size_experts"), num_experts, model),
        gate=config.get("gate_network", "mlp"),
        score_scale=scale,
        routing=RoutingConfig(
            rule=rule,  # type: ignore[arg-type]
            top_t=config.get("top_t"),
            lists=lists,
            max_devices=config.get("max_devices"),
            device_of_expert=config.get("device_of_expert"),
            num_groups=config.get("num_groups"),
        ),
    )


def _expert_size(size_experts: Any, num_experts: int, model: ModelConfig) -> int:
    """F from `size_experts`, a list of E sizes per layer, or null for equal shares of intermediate_size."""
    n = model.intermediate_size
    if n % num_experts:
        raise UserError(
            f"num_experts ({num_experts}) must divide intermediate_size ({n}); unequal experts are not supported yet"
        )
    share = n // num_experts
    if size_experts is not None and not _all_equal(size_experts, (model.num_layers, num_experts), share):
        raise UserError(
            f"size_experts must be {share} for each of {num_experts} experts in each of {model.num_layers} layers, "
            f"got {str(size_experts)[:60]}...; unequal experts are not supported yet"
        )
    return share


def _all_equal(rows: Any, shape: tuple[int, int], value: int) -> bool:
    if not isinstance(rows, list) or len(rows) != shape[0]:
        return False
    return all(isinstance(row, list) and len(row) == shape[1] and all(x == value for x in row) for row in rows)


def write_moe(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """The keys that `read_moe` reads; those of a rule that is not used are left out.

    Raises:
        UserError: the model has what this family has not.
    """
    routing = moe.routing
    if moe.score != "softmax_of_chosen" or moe.renormalise:
        raise UserError(
            f"the model weighs its experts by {moe.score}{', renormalised' if moe.renormalise else ''}, LLaMA-MoE by "
            "softmax_of_chosen; it cannot be exported to that family"
        )
    config: dict[str, Any] = {
        "intermediate_size": moe.num_experts * moe.expert_hidden_size,
        "num_experts": moe.num_experts,
        "num_selects": moe.top_k,
        "size_experts": [[moe.expert_hidden_size] * moe.num_experts] * model.num_layers,
        "gate_network": moe.gate,
        "score_scale_factor": moe.score_scale,
        "routing_rule": routing.rule,
    }
    if routing.rule == "group_limited":
        config |= {"num_groups": routing.num_groups, "max_devices": routing.max_devices}
    if routing.rule in ("c2r", "c2r_grouped"):
        config |= {"top_t": routing.top_t, "collaborative_list": routing.lists}
    if routing.rule == "c2r_grouped":
        config |= {"max_devices": routing.max_devices, "device_of_expert": routing.device_of_expert}
    return config


FAMILY = Family(
    architecture="LlamaMoEForCausalLM",
    model_type="llama_moe",
    transformers_class="checkpoint_tools.hf_modeling.modeling_llama_moe:LlamaMoEForCausalLM",
    names=names,
    fixed={
        "hidden_act": ("silu", "silu"),
        "gate_type": ("TopKBalancedNoisyGate", "TopKBalancedNoisyGate"),
        "calculator_type": ("UniversalCalculator", "UniversalCalculator"),
        "gate_use_softmax": (True, True),
        "gate_add_noise": (False, True),
        "multiply_gate_scores": (True, True),
        "add_weight_norm": (False, False),
    },
    moe_keys=frozenset(
        {"num_experts", "num_selects", "size_experts", "gate_network", "score_scale_factor"}
        | {"routing_rule", "top_t", "collaborative_list", "max_devices", "device_of_expert", "num_groups"}
    ),
    read_moe=read_moe,
    write_moe=write_moe,
    modeling_files=("configuration_llama_moe.py", "modeling_llama_moe.py"),
    auto_map={
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModel": "modeling_llama_moe.LlamaMoEModel",
        "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEForCausalLM",
    },
)
