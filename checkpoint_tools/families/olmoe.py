"""OLMoE: queries and keys are normed over all heads together."""

from checkpoint_tools.families.family import ATTENTION_BIAS, Family, Field, with_defaults
from checkpoint_tools.families.llama import DENSE_NAMES, QK_NORM_NAMES
from checkpoint_tools.families.mixture import Mixture, mixture_names

_MIXTURE = Mixture(
    fields=(
        Field("num_experts", "num_experts", int, 64),
        Field("num_experts_per_tok", "top_k", int, 8),
        Field("intermediate_size", "expert_hidden_size", int, 2048),
    ),
    renormalises=Field("norm_topk_prob", "renormalise", bool, False),
)

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    transformers_class="transformers:OlmoeForCausalLM",
    names=lambda _: {
        **DENSE_NAMES,  # of condensed layers
        **QK_NORM_NAMES,
        **mixture_names("model.layers.{i}.mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    },
    fields=tuple(
        f
        for f in with_defaults(ATTENTION_BIAS, max_position_embeddings=4096, rms_norm_eps=1e-5)
        if f.key != "head_dim"  # always hidden_size / num_attention_heads
    ),
    fixed={"hidden_act": ("silu", "silu"), "clip_qkv": (None, None)},
    always={"qk_norm": "all"},
    more_keys=_MIXTURE.keys,
    read_more=_MIXTURE.read,
    write_more=_MIXTURE.write,
)
