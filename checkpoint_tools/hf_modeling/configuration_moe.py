"""Configurations of MoE families with constrained routing, for `trust_remote_code` in transformers 4.48 to 5.x.

Keys are those of each family's own config.json; `top_t` and `collaborative_list` are C2R's, `routing_rule`,
`max_devices`, `device_of_expert`, `num_groups` and `routing_weights` ours. All are LLaMA with experts: what differs is
how keys and weights are called, biases, norms of queries and keys, and shared experts. Every class has an `__init__` of
its own: transformers 5 would make one that forgets those above it.
"""

from typing import Any, ClassVar

from transformers import LlamaConfig

RULES = ("topk", "group_limited", "c2r", "c2r_grouped")
_ROUTING = ("top_t", "collaborative_list", "max_devices", "device_of_expert", "num_groups")


class RoutedConfig(LlamaConfig):
    """What the families share.

    Args:
        routing_rule: `topk`, `group_limited`, `c2r` (arXiv:2504.01337) or `c2r_grouped`; None: `c2r` if there is a
            list, else `topk`.
        condensed_layers: layers, as text, whose experts have become one dense FFN: its `width` (0: there is none),
            `shared_size`, channels of shared experts that come first, whether these are `gated` by a sigmoid, and
            `scales` of the experts behind them, which share the rest evenly.
        routing_weights: of the chosen experts: `model`, as the family weighs them; `selected`, divided by their sum;
            `match_plain_mass`, with the sum that plain top-k would have.
        kwargs: the family's own keys, those of the rule, and LLaMA's.
    """

    base_model_tp_plan: ClassVar[dict[str, str]] = {}
    experts_key: ClassVar[str] = "num_experts"
    top_k_key: ClassVar[str] = "num_experts_per_tok"
    size_key: ClassVar[str] = "moe_intermediate_size"
    renormalise_key: ClassVar[str | None] = "norm_topk_prob"  # None: always
    qk_norm: ClassVar[str | None] = None  # `head` or `all`
    qkv_bias_only: ClassVar[bool] = False  # biases on queries, keys and values, not behind attention

    def __init__(
        self,
        routing_rule: str | None = None,
        routing_weights: str = "model",
        condensed_layers: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in _ROUTING:
            setattr(self, name, kwargs.pop(name, None))
        self.routing_rule = routing_rule or ("topk" if self.collaborative_list is None else "c2r")
        self.routing_weights = routing_weights
        self.condensed_layers = condensed_layers
        if self.qkv_bias_only:
            kwargs["attention_bias"] = True
        super().__init__(**kwargs)
        if self.routing_rule not in RULES:
            raise ValueError(f"routing_rule is {self.routing_rule!r}, known are {', '.join(RULES)}")

    def moe_layers(self) -> list[int]:
        """The layers with experts, ascending: what lists and tables have a row for."""
        condensed = self.condensed_layers or {}
        return [i for i in range(self.num_hidden_layers) if self.has_experts(i) and str(i) not in condensed]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return True


class _QwenPattern(RoutedConfig):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def has_experts(self, layer: int) -> bool:
        """As `mlp_only_layers` and `decoder_sparse_step` say."""
        step = getattr(self, "decoder_sparse_step", None) or 1
        return layer not in (getattr(self, "mlp_only_layers", None) or []) and (layer + 1) % step == 0


class MixtralC2RConfig(RoutedConfig):
    """Mixtral."""

    model_type = "mixtral_c2r"
    experts_key = "num_local_experts"
    size_key = "intermediate_size"
    renormalise_key = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Qwen2MoeC2RConfig(_QwenPattern):
    """Qwen1.5-MoE and Qwen2-MoE."""

    model_type = "qwen2_moe_c2r"
    qkv_bias_only = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Qwen3MoeC2RConfig(_QwenPattern):
    """Qwen3-MoE."""

    model_type = "qwen3_moe_c2r"
    qk_norm = "head"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class OlmoeC2RConfig(RoutedConfig):
    """OLMoE."""

    model_type = "olmoe_c2r"
    size_key = "intermediate_size"
    qk_norm = "all"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class DeepseekConfig(RoutedConfig):
    """DeepSeekMoE 16B."""

    model_type = "deepseek"
    experts_key = "n_routed_experts"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def has_experts(self, layer: int) -> bool:
        """As `first_k_dense_replace` and `moe_layer_freq` say."""
        first, step = getattr(self, "first_k_dense_replace", 0), getattr(self, "moe_layer_freq", 1)
        return layer >= first and layer % step == 0


class MoLlamaConfig(RoutedConfig):
    """MoLlama."""

    model_type = "llama"
    top_k_key = "expert_top_k"
    size_key = "intermediate_size"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def has_experts(self, layer: int) -> bool:
        """As `moe_start_layer` and `moe_layer_freq` say."""
        first, step = getattr(self, "moe_start_layer", 0), getattr(self, "moe_layer_freq", 1)
        return layer >= first and (layer - first) % step == 0


__all__ = [
    "DeepseekConfig",
    "MixtralC2RConfig",
    "MoLlamaConfig",
    "OlmoeC2RConfig",
    "Qwen2MoeC2RConfig",
    "Qwen3MoeC2RConfig",
]
