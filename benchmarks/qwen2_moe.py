"""transformers' Qwen2-MoE and the engine's model of the same weights, for comparisons."""

from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from ep_engine.model_config import ModelConfig, MoEConfig


def model_config(config: Qwen2MoeConfig) -> ModelConfig:
    """The engine's description of a Qwen2-MoE without biases, experts in every layer."""
    assert not config.qkv_bias, "the engine's attention has biases on all four matrices or on none"
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_embeddings=config.tie_word_embeddings,
        moe=MoEConfig(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            expert_hidden_size=config.moe_intermediate_size,
            gate="linear",
            score="softmax",
            renormalise=config.norm_topk_prob,
            shared_hidden_size=config.shared_expert_intermediate_size,
            shared_gate=True,
        ),
    )


def engine_views(model: Qwen2MoeForCausalLM) -> dict[str, Tensor]:
    """Its weights under the engine's names, as views that may be written to."""
    state = model.state_dict()
    views = {
        "embed.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for i in range(model.config.num_hidden_layers):
        at, here = f"model.layers.{i}", f"layers.{i}"
        views |= {f"{here}.attention.w_{x}.weight": state[f"{at}.self_attn.{x}_proj.weight"] for x in "qkvo"}
        views[f"{here}.attention_norm.weight"] = state[f"{at}.input_layernorm.weight"]
        views[f"{here}.ffn_norm.weight"] = state[f"{at}.post_attention_layernorm.weight"]
        views[f"{here}.moe.router.w_in"] = state[f"{at}.mlp.gate.weight"]
        views[f"{here}.moe.shared_gate.weight"] = state[f"{at}.mlp.shared_expert_gate.weight"]
        for part in ("gate", "up", "down"):
            views[f"{here}.moe.shared.w_{part}.weight"] = state[f"{at}.mlp.shared_expert.{part}_proj.weight"]
        gate_up, down = state[f"{at}.mlp.experts.gate_up_proj"], state[f"{at}.mlp.experts.down_proj"]
        for e in range(model.config.num_experts):
            views[f"{here}.moe.experts.{e}.w_gate"], views[f"{here}.moe.experts.{e}.w_up"] = gate_up[e].chunk(2)
            views[f"{here}.moe.experts.{e}.w_down"] = down[e]
    return views
