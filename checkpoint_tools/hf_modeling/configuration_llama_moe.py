"""Configuration of LLaMA-MoE with constrained routing, for `trust_remote_code` in transformers 4.48 to 5.x.

The fields are those of the published LLaMA-MoE v1 and C2R models; `routing_rule`, `max_devices`, `device_of_expert`,
`num_groups`, `dense_layers` and `attention_output_bias` are ours. What this modeling file does not compute is refused
here, never ignored.
"""

from typing import Any, ClassVar

from transformers import LlamaConfig

RULES = ("topk", "group_limited", "c2r", "c2r_grouped")
# Options of the published configuration class that change the mathematics, and the one value implemented here.
FIXED = {
    "gate_type": "TopKBalancedNoisyGate",
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
}
FIXED_OF_RESIDUAL = {
    "gate_use_softmax_residual": True,
    "multiply_gate_scores_residual": True,
    "add_weight_norm": False,
}


class LlamaMoEConfig(LlamaConfig):
    """A LLaMA whose FFNs are mixtures of experts.

    Args:
        num_experts: E, experts per layer; the most that one has.
        num_selects: K, experts chosen per token, in 1..E.
        size_experts: [L][E], hidden width of every expert; a shorter row is that of a layer with fewer experts. None:
            an equal share of the width of all each.
        gate_network: `linear`, one (E, D) matrix, or `mlp`, (E, D), tanh, (E, E).
        gate_add_noise: whether the gate has a noise matrix; it is kept, and has no part in inference.
        gate_use_softmax: whether the combine weights are a softmax over the K chosen, not their logits.
        score_scale_factor: factor on the combine weights, or [L], that of every layer.
        add_weight_norm: whether a weight of every layer, which starts as that factor, takes its place.
        routing_rule: `topk`, `group_limited`, `c2r` (arXiv:2504.01337) or `c2r_grouped`; None: `c2r` if there is a
            list, else `topk`.
        top_t: T, how many collaborators of the top-1 expert are candidates, in K-1..E-1; or [L], that of every layer.
        collaborative_list: [L][E][E], row i: all experts, closest collaborator of i first, i itself last.
        max_devices: M, in 1..: the experts of a token live on at most M devices (`c2r_grouped`) or in M groups
            (`group_limited`); or [L], that of every layer.
        device_of_expert: [L][E], the device of every expert; `c2r_grouped` reads it.
        num_groups: equal groups of experts with consecutive ids; `group_limited` reads it.
        dense_layers: layers without experts, as text, and the width of their FFN; L counts the others.
        attention_output_bias: whether the last matrix of attention has a bias where the others have one.

    Raises:
        ValueError: an option asks for what this file does not compute.
    """

    model_type = "llama_moe"
    _fixed: ClassVar[dict[str, Any]] = FIXED
    # LLaMA's plan also cuts mlp.gate_proj and its fellows, which this model does not have.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        f"layers.*.self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"
    }

    def __init__(
        self,
        num_experts: int = 16,
        num_selects: int = 4,
        size_experts: list[list[int]] | None = None,
        gate_network: str = "mlp",
        gate_add_noise: bool = True,
        gate_use_softmax: bool = True,
        score_scale_factor: float | list[float] = 1.0,
        add_weight_norm: bool = False,
        routing_rule: str | None = None,
        top_t: int | list[int] | None = None,
        collaborative_list: list[list[list[int]]] | None = None,
        max_devices: int | list[int] | None = None,
        device_of_expert: list[list[int]] | None = None,
        num_groups: int | None = None,
        dense_layers: dict[str, int] | None = None,
        attention_output_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.num_selects = num_selects
        self.size_experts = size_experts
        self.gate_network = gate_network
        self.gate_add_noise = gate_add_noise
        self.gate_use_softmax = gate_use_softmax
        self.score_scale_factor = score_scale_factor
        self.add_weight_norm = add_weight_norm
        self.routing_rule = routing_rule or ("topk" if collaborative_list is None else "c2r")
        self.top_t = top_t
        self.collaborative_list = collaborative_list
        self.max_devices = max_devices
        self.device_of_expert = device_of_expert
        self.num_groups = num_groups
        self.dense_layers = dense_layers
        self.attention_output_bias = attention_output_bias
        for name, only in self._fixed.items():
            setattr(self, name, kwargs.pop(name, only))
        super().__init__(**kwargs)
        self._check_moe()

    def moe_layers(self) -> list[int]:
        """The layers with experts, ascending: what lists and tables have a row for."""
        return [i for i in range(self.num_hidden_layers) if str(i) not in (self.dense_layers or {})]

    def expert_sizes(self, index: int) -> list[int]:
        """[E]: the hidden width of every expert of a layer, by its place among those with experts."""
        if self.size_experts:
            return self.size_experts[index]
        return [self._width_of_experts() // self.num_experts] * self.num_experts

    def _width_of_experts(self) -> int:
        return self.intermediate_size

    def _check_moe(self) -> None:
        for name, only in self._fixed.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} is {getattr(self, name)!r}, this modeling file computes only {only!r}")
        e, k = self.num_experts, self.num_selects
        if not 1 <= k <= e:
            raise ValueError(f"num_selects ({k}) must be in 1..num_experts ({e})")
        width, count = self._width_of_experts(), len(self.moe_layers())
        if not self.size_experts and width % e:
            raise ValueError(f"num_experts ({e}) must divide the width of all experts ({width})")
        each = [len(row) for row in self.size_experts] if self.size_experts else [e] * count
        if len(each) != count or max(each) != e or min(each) < k:
            raise ValueError(
                f"size_experts must have {k} to {e} sizes for each of {count} layers with experts, got {each}"
            )
        if isinstance(self.score_scale_factor, list) and len(self.score_scale_factor) != count:
            raise ValueError(f"score_scale_factor must be a number, or one for each of {count} layers with experts")
        if self.routing_rule not in RULES:
            raise ValueError(f"routing_rule is {self.routing_rule!r}, known are {', '.join(RULES)}")
        if self.routing_rule == "topk":
            return
        if self.routing_rule == "group_limited":
            if self.num_groups is None or self.max_devices is None or any(n % self.num_groups for n in each):
                raise ValueError(f"routing_rule group_limited needs max_devices and num_groups, a divisor of {e}")
            return
        each_t = self.top_t if isinstance(self.top_t, list) else [self.top_t] * count
        fits = (t is not None and k - 1 <= t <= n - 1 for t, n in zip(each_t, each, strict=True))
        if self.collaborative_list is None or not all(fits):
            raise ValueError(
                f"routing_rule {self.routing_rule} needs collaborative_list and top_t in {k - 1}..{min(each) - 1}, "
                f"got top_t {self.top_t}"
            )
        if self.routing_rule == "c2r_grouped" and (self.device_of_expert is None or self.max_devices is None):
            raise ValueError("routing_rule c2r_grouped needs device_of_expert and max_devices")


class LlamaMoEResidualConfig(LlamaMoEConfig):
    """Residual experts beside them, which every token goes through.

    Args:
        intermediate_size_moe: width of all experts of a layer.
        intermediate_size_residual: width of all residual experts; the two add up to intermediate_size.
        num_experts_residual: r, equal residual experts per layer.
        score_scale_factor_residual: factor on their weights, a softmax over the r.
        use_weighting: whether a softmax of two weighs the chosen experts against them.
        kwargs: of LlamaMoEConfig.
    """

    model_type = "llama_moe_residual"
    _fixed: ClassVar[dict[str, Any]] = FIXED | FIXED_OF_RESIDUAL

    def __init__(
        self,
        intermediate_size_moe: int = 9632,
        intermediate_size_residual: int = 1376,
        num_experts_residual: int = 2,
        score_scale_factor_residual: float = 1.0,
        use_weighting: bool = False,
        **kwargs: Any,
    ) -> None:
        self.intermediate_size_moe = intermediate_size_moe
        self.intermediate_size_residual = intermediate_size_residual
        self.num_experts_residual = num_experts_residual
        self.score_scale_factor_residual = score_scale_factor_residual
        self.use_weighting = use_weighting
        super().__init__(**{"num_experts": 14, "num_selects": 2, **kwargs})

    def _width_of_experts(self) -> int:
        return self.intermediate_size_moe


__all__ = ["LlamaMoEConfig", "LlamaMoEResidualConfig"]
