"""Mistral and Mixtral: LLaMA with a window; Mixtral's weights of the chosen experts add up to 1."""

from checkpoint_tools.families.family import SLIDING_WINDOW, Family, Field, with_defaults
from checkpoint_tools.families.llama import DENSE_NAMES
from checkpoint_tools.families.mixture import Mixture, mixture_names

_SILU = {"hidden_act": ("silu", "silu")}

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    transformers_class="transformers:MistralForCausalLM",
    names=lambda _: DENSE_NAMES,
    fields=with_defaults(
        Field("sliding_window", "sliding_window", int, 4096, nullable=True),
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    fixed=_SILU,
)

_MIXTURE = Mixture(
    fields=(
        Field("num_local_experts", "num_experts", int, 8),
        Field("num_experts_per_tok", "top_k", int, 2),
        Field("intermediate_size", "expert_hidden_size", int, 14336),
    )
)

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    transformers_class="transformers:MixtralForCausalLM",
    names=lambda _: {
        **DENSE_NAMES,  # of condensed layers
        **mixture_names("model.layers.{i}.block_sparse_moe", gate="w1", up="w3", down="w2"),
    },
    fields=with_defaults(SLIDING_WINDOW, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5),
    fixed=_SILU,
    rope_theta=1e6,
    more_keys=_MIXTURE.keys,
    read_more=_MIXTURE.read,
    write_more=_MIXTURE.write,
)
