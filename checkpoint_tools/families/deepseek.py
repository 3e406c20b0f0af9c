"""DeepSeekMoE (16B, `deepseek`): LLaMA's attention, the first layer dense, shared experts as one wide one.

transformers does not know this family; an export has our modeling file. Keys are those of deepseek-moe-16b-base.
"""

from checkpoint_tools.families.family import ATTENTION_BIAS, Family, Field, with_defaults, with_our_code
from checkpoint_tools.families.llama import DENSE_NAMES
from checkpoint_tools.families.mixture import DEEPSEEK, Mixture, mixture_names

_MLP = "model.layers.{i}.mlp"
_MIXTURE = Mixture(
    fields=(
        Field("n_routed_experts", "num_experts", int),
        Field("num_experts_per_tok", "top_k", int),
        Field("moe_intermediate_size", "expert_hidden_size", int, 1407),
    ),
    renormalises=Field("norm_topk_prob", "renormalise", bool, False),
    pattern=DEEPSEEK,
    shared_size=Field("moe_intermediate_size", "shared_hidden_size", int, 1407),
    shared_count=Field("n_shared_experts", "count", int, None),
)

_FAMILY = Family(
    architecture="DeepseekForCausalLM",
    model_type="deepseek",
    transformers_class=None,
    names=lambda _: {
        **DENSE_NAMES,
        **mixture_names(_MLP, gate="gate_proj", up="up_proj", down="down_proj"),
        "layers.{i}.moe.shared.w_gate": f"{_MLP}.shared_experts.gate_proj",
        "layers.{i}.moe.shared.w_up": f"{_MLP}.shared_experts.up_proj",
        "layers.{i}.moe.shared.w_down": f"{_MLP}.shared_experts.down_proj",
    },
    fields=with_defaults(ATTENTION_BIAS),
    fixed={"hidden_act": ("silu", "silu"), "scoring_func": ("softmax", "softmax")},
    more_keys=_MIXTURE.keys,
    read_more=_MIXTURE.read,
    write_more=_MIXTURE.write,
)

DEEPSEEK_MOE = with_our_code(_FAMILY, "Deepseek", _FAMILY.architecture, _FAMILY.model_type)
