"""Qwen2, Qwen1.5/2-MoE and Qwen3-MoE: biases on queries, keys and values; Qwen3 norms queries and keys instead."""

from dataclasses import replace

from checkpoint_tools.families.family import ATTENTION_BIAS, Family, Field, Names, with_defaults
from checkpoint_tools.families.llama import DENSE_NAMES, QK_NORM_NAMES
from checkpoint_tools.families.mixture import QWEN, Mixture, mixture_names

_FIXED = {"hidden_act": ("silu", "silu"), "use_sliding_window": (False, False)}
_EXPERTS = mixture_names("model.layers.{i}.mlp", gate="gate_proj", up="up_proj", down="down_proj")
_SHARED: Names = {
    "layers.{i}.moe.shared.w_gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "layers.{i}.moe.shared.w_up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "layers.{i}.moe.shared.w_down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "layers.{i}.moe.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
    "layers.{i}.ffn.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",  # of a condensed layer
}
_RENORMALISES = Field("norm_topk_prob", "renormalise", bool, False)

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    transformers_class="transformers:Qwen2ForCausalLM",
    names=lambda _: DENSE_NAMES,
    fields=with_defaults(num_key_value_heads=32, max_position_embeddings=32768),
    fixed=_FIXED,
    always={"attention_bias": "qkv"},
)

_QWEN2_MIXTURE = Mixture(
    fields=(
        Field("num_experts", "num_experts", int, 60),
        Field("num_experts_per_tok", "top_k", int, 4),
        Field("moe_intermediate_size", "expert_hidden_size", int, 1408),
    ),
    renormalises=_RENORMALISES,
    pattern=QWEN,
    shared_size=Field("shared_expert_intermediate_size", "shared_hidden_size", int, 5632, least=0),
    shared_gate=True,
)

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    transformers_class="transformers:Qwen2MoeForCausalLM",
    names=lambda _: {**DENSE_NAMES, **_EXPERTS, **_SHARED},
    fields=with_defaults(num_key_value_heads=16, max_position_embeddings=32768),
    fixed={**_FIXED, "qkv_bias": (True, True)},
    always={"attention_bias": "qkv"},
    more_keys=_QWEN2_MIXTURE.keys,
    read_more=_QWEN2_MIXTURE.read,
    write_more=_QWEN2_MIXTURE.write,
)

_QWEN3_MIXTURE = replace(
    _QWEN2_MIXTURE,
    fields=(
        Field("num_experts", "num_experts", int, 128, other_key="num_local_experts"),
        Field("num_experts_per_tok", "top_k", int, 8),
        Field("moe_intermediate_size", "expert_hidden_size", int, 768),
    ),
    shared_size=None,
    shared_gate=False,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    transformers_class="transformers:Qwen3MoeForCausalLM",
    names=lambda _: {**DENSE_NAMES, **QK_NORM_NAMES, **_EXPERTS},
    fields=with_defaults(ATTENTION_BIAS, num_key_value_heads=4, max_position_embeddings=32768),
    fixed=_FIXED,
    always={"qk_norm": "head"},
    more_keys=_QWEN3_MIXTURE.keys,
    read_more=_QWEN3_MIXTURE.read,
    write_more=_QWEN3_MIXTURE.write,
)
