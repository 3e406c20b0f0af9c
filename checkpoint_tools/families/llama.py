"""LLaMA: any dense `LlamaForCausalLM`."""

from checkpoint_tools.family import DECODER_FIELDS, Family, Field

ATTENTION_NAMES = {
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

_NAMES = ATTENTION_NAMES | {
    "layers.{i}.ffn.w_gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.ffn.w_up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.ffn.w_down": "model.layers.{i}.mlp.down_proj",
}

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    transformers_class="transformers:LlamaForCausalLM",
    names=lambda _: _NAMES,
    fields=(*DECODER_FIELDS, Field("mlp_bias", "mlp_bias", bool, False)),
    fixed={"hidden_act": ("silu", "silu")},
)
