"""LLaMA-MoE with constrained routing, for `trust_remote_code` in transformers 4.48 to 5.x.

    tokens -> gate -> selection rule -> experts -> weighted sum

Everything but the FFN is transformers' own LLaMA, so that cache, attention backends and `generate` work unchanged.
Parameter names are those of the published LLaMA-MoE v1 checkpoints.

Shape suffixes: T tokens, D model dim, E experts, K experts chosen per token, F hidden width of an expert.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .configuration_llama_moe import LlamaMoEConfig, LlamaMoEResidualConfig
from .selection import of_layer, routing_tables, select_experts

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 48):
    raise ImportError(
        f"transformers {transformers.__version__} takes keys that contain weight_g for those of a weight norm and "
        "loses the experts' weight_gate; install transformers 4.48 or later"
    )


class LlamaMoEGate(nn.Module):
    """Logits of the experts in fp32, whatever the dtype of the weights."""

    def __init__(self, config: LlamaMoEConfig, num_experts: int) -> None:
        super().__init__()
        d, e = config.hidden_size, num_experts
        linear = nn.Linear(d, e, bias=False)
        mlp = config.gate_network == "mlp"
        self.gate_network = nn.Sequential(linear, nn.Tanh(), nn.Linear(e, e, bias=False)) if mlp else linear
        if config.gate_add_noise:  # part of the checkpoint, and of training alone
            self.weight_noise = nn.Linear(d, e, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.float()
        linears = [module for module in self.gate_network.modules() if isinstance(module, nn.Linear)]
        logits = F.linear(x, linears[0].weight.float())
        for linear in linears[1:]:
            logits = F.linear(torch.tanh(logits), linear.weight.float())
        return logits


class LlamaMoEExperts(nn.Module):
    """The weights of some experts of a layer, under their published names."""

    def __init__(self, d: int, sizes: list[int]) -> None:
        super().__init__()
        self.weight_gate = nn.ParameterList(nn.Parameter(torch.empty(f, d)) for f in sizes)
        self.weight_up = nn.ParameterList(nn.Parameter(torch.empty(f, d)) for f in sizes)
        self.weight_down = nn.ParameterList(nn.Parameter(torch.empty(d, f)) for f in sizes)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        hidden = F.silu(F.linear(x, self.weight_gate[expert])) * F.linear(x, self.weight_up[expert])
        return F.linear(hidden, self.weight_down[expert])


class LlamaMoEWeightNorm(nn.Module):
    """A factor that is learned, and what it starts as."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((1,), start))


class LlamaMoECalculator(nn.Module):
    """Weighted sum of the chosen experts in fp32; no token is dropped."""

    def __init__(self, d: int, sizes: list[int], learned_scale: float | None = None) -> None:
        super().__init__()
        self.experts = LlamaMoEExperts(d, sizes)
        if learned_scale is not None:
            self.mlp_norm = LlamaMoEWeightNorm(learned_scale)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in torch.unique(ids_TK).tolist():
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            y = self.experts(x_TD[token], expert).float()
            y_TD = y_TD.index_add(0, token, y * weights_TK[token, slot, None])
        return y_TD.to(x_TD.dtype)


class LlamaMoEBlock(nn.Module):
    """The mixture of experts that stands in the place of LLaMA's FFN; `index` is among the layers with experts."""

    def __init__(self, config: LlamaMoEConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        sizes = config.expert_sizes(index)
        self.num_experts = len(sizes)
        self.gate = LlamaMoEGate(config, self.num_experts)
        self.scale = float(of_layer(config.score_scale_factor, index))
        learned = self.scale if config.add_weight_norm else None
        self.calculator = LlamaMoECalculator(config.hidden_size, sizes, learned)
        self._tables: tuple[torch.device, dict[str, Any]] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.gate(x_TD)
        # Softmax keeps the order; the logits themselves are compared, so that no two scores round together.
        ids_TK = select_experts(logits_TE.detach(), self.config.num_selects, **self._routing_tables(x_TD.device))
        weights_TK = logits_TE.gather(1, ids_TK)
        if self.config.gate_use_softmax:
            weights_TK = torch.softmax(weights_TK, dim=1)
        scale = self.calculator.mlp_norm.weight.float() if self.config.add_weight_norm else self.scale
        y_TD: Tensor = self.calculator(x_TD, ids_TK, weights_TK * scale)
        return y_TD.reshape(hidden_states.shape)

    def _routing_tables(self, device: torch.device) -> dict[str, Any]:
        """This layer's arguments of `select_experts`.

        Not buffers: `from_pretrained` builds modules on the meta device and would leave unsaved buffers without values.
        """
        if self._tables is None or self._tables[0] != device:
            # Tables first made inside inference_mode could not be used in training later.
            with torch.inference_mode(False):
                self._tables = device, routing_tables(self.config, self.num_experts, self.index, device)
        return self._tables[1]


class LlamaMoEResidualGate(nn.Module):
    """Weights of the residual experts: a softmax over all of them."""

    def __init__(self, config: LlamaMoEResidualConfig) -> None:
        super().__init__()
        self.gate_network = nn.Linear(config.hidden_size, config.num_experts_residual, bias=False)
        self.scale = config.score_scale_factor_residual

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.softmax(self.gate_network(x_TD).float(), dim=-1) * self.scale


class LlamaMoEResidualExperts(nn.Module):
    """Experts that every token goes through."""

    def __init__(self, config: LlamaMoEResidualConfig) -> None:
        super().__init__()
        count = config.num_experts_residual
        self.gate = LlamaMoEResidualGate(config)
        self.calculator = LlamaMoECalculator(config.hidden_size, [config.intermediate_size_residual // count] * count)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK = self.gate(x_TD)
        ids_TK = torch.arange(weights_TK.shape[1], device=x_TD.device).expand_as(weights_TK)
        return self.calculator(x_TD, ids_TK, weights_TK)


class LlamaMoEResidualBlock(nn.Module):
    """Both, added up, with weights if there are any."""

    def __init__(self, config: LlamaMoEResidualConfig, index: int) -> None:
        super().__init__()
        self.moe_layer = LlamaMoEBlock(config, index)
        self.residual_block = LlamaMoEResidualExperts(config)
        self.use_weighting = config.use_weighting
        if config.use_weighting:
            self.weighting_network = nn.Sequential(nn.Linear(config.hidden_size, 2, bias=False), nn.Softmax(dim=-1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed_TD, residual_TD = self.moe_layer(x_TD), self.residual_block(x_TD)
        if self.use_weighting:
            shares_T2 = self.weighting_network(x_TD)
            routed_TD, residual_TD = shares_T2[:, :1] * routed_TD, shares_T2[:, 1:] * residual_TD
        return (routed_TD + residual_TD).reshape(hidden_states.shape)


class _LlamaMoELoading:
    """What loading must know beyond LLaMA: the names and the initialisation of the bare expert parameters."""

    config_class = LlamaMoEConfig

    @classmethod
    def _fix_state_dict_key_on_load(cls, key: str) -> str | tuple[str, bool]:
        """Rename nothing: transformers 4.48 takes `experts.weight_gate` for the `weight_g` of a weight norm."""
        fixed = super()._fix_state_dict_key_on_load(key)  # type: ignore[misc]
        return (key, False) if isinstance(fixed, tuple) else key  # 4.49 and later return a pair

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        # The lists, not their owner: transformers 5.23 skips modules of remote code without parameters of their own.
        if isinstance(module, nn.ParameterList):
            for weight in module:
                nn.init.normal_(weight, mean=0.0, std=self.config.initializer_range)  # type: ignore[attr-defined]
        if isinstance(module, LlamaMoEWeightNorm):
            nn.init.constant_(module.weight, module.start)


class LlamaMoEModel(_LlamaMoELoading, LlamaModel):
    """LLaMA's decoder stack with a mixture of experts in every layer, but for those that stay dense."""

    block: type[nn.Module] = LlamaMoEBlock

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        for index, i in enumerate(config.moe_layers()):
            self.layers[i].mlp = self.block(config, index)
        for i, width in (config.dense_layers or {}).items():
            self.layers[int(i)].mlp = _dense(config, width)
        for layer in self.layers:
            if config.attention_bias and not config.attention_output_bias:
                old = layer.self_attn.o_proj
                layer.self_attn.o_proj = nn.Linear(old.in_features, old.out_features, bias=False)
        self.post_init()


def _dense(config: LlamaMoEConfig, width: int) -> nn.Module:
    """LLaMA's FFN of another width."""
    other = copy.copy(config)
    other.intermediate_size = width
    return LlamaMLP(other)


class LlamaMoEResidualModel(LlamaMoEModel):
    """The same with residual experts beside the others."""

    config_class = LlamaMoEResidualConfig
    block = LlamaMoEResidualBlock


class LlamaMoEForCausalLM(_LlamaMoELoading, LlamaForCausalLM):
    """The decoder stack and its language-model head."""

    stack: type[LlamaMoEModel] = LlamaMoEModel

    def __init__(self, config: LlamaMoEConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's own would build a dense model first
        self.model = self.stack(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LlamaMoEResidualForCausalLM(LlamaMoEForCausalLM):
    """The same with residual experts."""

    config_class = LlamaMoEResidualConfig
    stack = LlamaMoEResidualModel


class LlamaMoEForSequenceClassification(_LlamaMoELoading, LlamaForSequenceClassification):
    """The decoder stack and a head of labels, asked at the last token of a text."""

    stack: type[LlamaMoEModel] = LlamaMoEModel

    def __init__(self, config: LlamaMoEConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForSequenceClassification's own would build a dense model
        self.num_labels = config.num_labels
        self.model = self.stack(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class LlamaMoEResidualForSequenceClassification(LlamaMoEForSequenceClassification):
    """The same with residual experts."""

    config_class = LlamaMoEResidualConfig
    stack = LlamaMoEResidualModel


__all__ = [
    "LlamaMoEForCausalLM",
    "LlamaMoEForSequenceClassification",
    "LlamaMoEModel",
    "LlamaMoEResidualForCausalLM",
    "LlamaMoEResidualForSequenceClassification",
    "LlamaMoEResidualModel",
]
