"""LLaMA: any dense `LlamaForCausalLM`."""

from checkpoint_tools.families.family import ATTENTION_BIAS, DECODER_FIELDS, Family, Field, Names

ATTENTION_NAMES: Names = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.w_q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.w_k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.w_v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.w_o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}
QK_NORM_NAMES: Names = {
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
}
DENSE_NAMES: Names = {
    **ATTENTION_NAMES,
    "layers.{i}.ffn.w_gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.ffn.w_up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.ffn.w_down": "model.layers.{i}.mlp.down_proj",
}

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    transformers_class="transformers:LlamaForCausalLM",
    names=lambda _: DENSE_NAMES,
    fields=(*DECODER_FIELDS, ATTENTION_BIAS, Field("mlp_bias", "mlp_bias", bool, False)),
    fixed={"hidden_act": ("silu", "silu")},
    is_ours=lambda config: "expert_top_k" not in config,
)
