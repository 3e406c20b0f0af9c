"""The families of models, and which one a model belongs to."""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.families.deepseek import DEEPSEEK_MOE
from checkpoint_tools.families.family import Family, with_our_code
from checkpoint_tools.families.llama import FAMILY as LLAMA
from checkpoint_tools.families.llama_moe import CLASSIFIERS, LLAMA_MOE, LLAMA_MOE_RESIDUAL
from checkpoint_tools.families.mistral import MISTRAL, MIXTRAL
from checkpoint_tools.families.mollama import MOLLAMA
from checkpoint_tools.families.olmoe import OLMOE
from checkpoint_tools.families.qwen import QWEN2, QWEN2_MOE, QWEN3_MOE
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig

FAMILIES = (
    LLAMA, MISTRAL, QWEN2,
    LLAMA_MOE, LLAMA_MOE_RESIDUAL, *CLASSIFIERS, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_MOE, OLMOE, MOLLAMA,
)  # fmt: skip
# Those that transformers knows, with our code, which computes what theirs does and the rules besides.
CONSTRAINED = tuple(
    with_our_code(family, f"{family.architecture.removesuffix('ForCausalLM')}C2R",
                  family.architecture.replace("For", "C2RFor"), f"{family.model_type}_c2r")
    for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)
)  # fmt: skip


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is missing."""
    named = config.get("architectures") or [config.get("model_type")]
    for family in (*FAMILIES, *CONSTRAINED):
        if named in ([family.architecture], [family.model_type]) and family.is_ours(config):
            return family
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    raise UserError(f"{where}: architectures is {named!r}, known are {known}; this model cannot be read yet")


def family_of_model(model: ModelConfig, name: str | None = None, *, our_code: bool = False) -> Family:
    """The family that a model of the engine is exported to: `name`, the one it came from, or what fits what it has.

    Condensed layers need our code, which is taken for them where there are two.

    Raises:
        UserError: there is no family of that name, or the code of the family ignores the model's rule; `our_code` is
            for those of which there are two.
    """
    family = named_family(model, name)
    rule = model.moe.routing.rule if model.moe else "topk"
    twin = next((one for one in CONSTRAINED if one.name == family.name), None)
    if our_code and family.ignores_rules:
        if twin is None:
            raise UserError(f"--c2r has no effect on a model of {family.architecture}; leave it out")
        return twin
    if model.condensed and family.ignores_rules and twin is not None:
        return twin
    if rule != "topk" and family.ignores_rules:
        raise UserError(
            f"the model's rule is {rule}, which transformers' own {family.architecture} ignores; pass --c2r to write "
            "our modeling file with it"
        )
    return family


def named_family(model: ModelConfig, name: str | None = None) -> Family:
    """The family called `name`, the one the model came from, or what fits it, whether or not it can express all of it.

    Raises:
        UserError: there is none of that name.
    """
    wanted = name or model.family
    if wanted is None:
        if model.moe is not None:
            return LLAMA_MOE_RESIDUAL if model.moe.residual_experts else LLAMA_MOE
        return QWEN2 if model.attention_bias == "qkv" else MISTRAL if model.sliding_window else LLAMA
    for family in FAMILIES:
        if family.name == wanted:
            return family
    raise UserError(f"--family ({wanted}) is not known, known are {', '.join(f.name for f in FAMILIES)}; choose one")
