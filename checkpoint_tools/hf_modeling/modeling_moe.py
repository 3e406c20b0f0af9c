"""MoE families with constrained routing, for `trust_remote_code` in transformers 4.48 to 5.x.

    tokens -> gate -> selection rule -> experts -> weighted sum, and shared experts beside it

Everything but FFNs, and norms of queries and keys, is transformers' own LLaMA, so that cache, attention backends and
`generate` work unchanged. Parameter names are those of each family's published checkpoints.

Shape suffixes: T tokens, D model dim, E experts, K experts chosen per token, F hidden width of an expert, R width
inside a gate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
)

from .configuration_moe import (
    DeepseekConfig,
    MixtralC2RConfig,
    MoLlamaConfig,
    OlmoeC2RConfig,
    Qwen2MoeC2RConfig,
    Qwen3MoeC2RConfig,
    RoutedConfig,
)
from .selection import routing_tables, select_experts


class Expert(nn.Module):
    """SwiGLU under a family's names, gate, up and down."""

    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        for name, shape in zip(self.names, ((d, f), (d, f), (f, d)), strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class MixtralExpert(Expert):
    """Mixtral's names."""

    names = ("w1", "w3", "w2")


class CondensedFFN(Expert):
    """A layer whose experts have become one, with factors before its last matrix."""

    def __init__(self, d: int, width: int, shared_size: int, gated: bool, scales: list[float]) -> None:
        super().__init__(d, width)
        self.shared_expert_gate = nn.Linear(d, 1, bias=False) if gated else None
        self.sizes = [shared_size, *[(width - shared_size) // max(len(scales), 1)] * max(len(scales), 1)]
        self.scales = [1.0, *(scales or [1.0])]

    def forward(self, x: Tensor) -> Tensor:
        inside = F.silu(self.gate_proj(x)) * self.up_proj(x)
        parts = [part * scale for part, scale in zip(inside.split(self.sizes, dim=-1), self.scales, strict=True)]
        if self.shared_expert_gate is not None:
            parts[0] = torch.sigmoid(self.shared_expert_gate(x)) * parts[0]
        y: Tensor = self.down_proj(torch.cat(parts, dim=-1))
        return y


class NoFFN(nn.Module):
    """Adds nothing, and needs no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class RoutedBlock(nn.Module):
    """Gate and experts of one layer, `index` among those with experts."""

    expert: type[Expert] = Expert

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.top_k = getattr(config, config.top_k_key)
        self.num_experts = getattr(config, config.experts_key)
        self._tables: tuple[torch.device, dict[str, Any]] | None = None
        self.make(config.hidden_size, getattr(config, config.size_key))

    def make(self, d: int, f: int) -> None:
        """Make the weights."""
        self.gate = nn.Linear(d, self.num_experts, bias=False)
        self.experts = nn.ModuleList(self.expert(d, f) for _ in range(self.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.logits(x_TD)
        tables = self._routing_tables(x_TD.device)
        ids_TK = select_experts(logits_TE.detach(), self.top_k, **tables)
        weights_TK = self._weights(logits_TE, ids_TK, tables)
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in torch.unique(ids_TK).tolist():
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            y = self.run(x_TD[token], expert).float()
            y_TD = y_TD.index_add(0, token, y * weights_TK[token, slot, None])
        return (y_TD.to(x_TD.dtype) + self.beside(x_TD)).reshape(hidden_states.shape)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) in fp32, whatever the dtype of the weights."""
        return F.linear(x_TD.float(), self.gate.weight.float())

    def run(self, x: Tensor, expert: int) -> Tensor:
        """One expert."""
        y: Tensor = self.experts[expert](x)
        return y

    def beside(self, x_TD: Tensor) -> Tensor | float:
        """What every token goes through as well."""
        return 0.0

    def _weights(self, logits_TE: Tensor, ids_TK: Tensor, tables: dict[str, Any]) -> Tensor:
        shares_TE = torch.softmax(logits_TE, dim=1)
        weights_TK = shares_TE.gather(1, ids_TK)
        key, how = self.config.renormalise_key, self.config.routing_weights
        if key is None or getattr(self.config, key, False) or how == "selected":
            return weights_TK / weights_TK.sum(dim=1, keepdim=True)
        if how == "match_plain_mass" and tables:
            plain_T1 = shares_TE.gather(1, select_experts(logits_TE.detach(), self.top_k)).sum(dim=1, keepdim=True)
            return weights_TK * plain_T1 / weights_TK.sum(dim=1, keepdim=True)
        return weights_TK

    def _routing_tables(self, device: torch.device) -> dict[str, Any]:
        """Arguments of `select_experts`; no buffers, which `from_pretrained` would leave without values."""
        if self._tables is None or self._tables[0] != device:
            with torch.inference_mode(False):  # tables made inside could not be used in training later
                self._tables = device, routing_tables(self.config, self.num_experts, self.index, device)
        return self._tables[1]


class MixtralBlock(RoutedBlock):
    """Mixtral's."""

    expert = MixtralExpert


class Qwen2MoeBlock(RoutedBlock):
    """A shared expert with a sigmoid gate, if there is one."""

    def make(self, d: int, f: int) -> None:
        """Make the weights."""
        super().make(d, f)
        self.shared_expert = Expert(d, self.config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(d, 1, bias=False)

    def beside(self, x_TD: Tensor) -> Tensor:
        """The shared expert's output, gated."""
        y_TD: Tensor = torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
        return y_TD


class DeepseekBlock(RoutedBlock):
    """Shared experts as one wide one."""

    def make(self, d: int, f: int) -> None:
        """Make the weights."""
        super().make(d, f)
        count = getattr(self.config, "n_shared_experts", None)
        self.shared_experts = Expert(d, count * f) if count else None

    def beside(self, x_TD: Tensor) -> Tensor | float:
        """The shared experts' output."""
        return 0.0 if self.shared_experts is None else self.shared_experts(x_TD)


class _Stacked(nn.Module):
    """A weight of all experts, each transposed: (E, in, out)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _MoLlamaGate(nn.Module):
    """Its three gates, in fp32."""

    def __init__(self, config: RoutedConfig, d: int, e: int) -> None:
        super().__init__()
        self.kind, r = getattr(config, "gate_type", "mlp"), getattr(config, "gating_size", 256)
        if self.kind == "linear":
            self.w_gate: nn.Module = nn.Sequential(nn.Linear(d, e, bias=False))
        elif self.kind == "mlp":
            self.w_gate = nn.Sequential(nn.Linear(d, r), nn.GELU(), nn.Identity(), nn.Linear(r, e, bias=False))
        else:
            self.w_gate = nn.Linear(d, r, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(e, r))
            self.temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.float()
        if self.kind == "linear":
            return F.linear(x, self.w_gate[0].weight.float())
        if self.kind == "mlp":
            inside = F.gelu(F.linear(x, self.w_gate[0].weight.float(), self.w_gate[0].bias.float()))
            return F.linear(inside, self.w_gate[3].weight.float())
        u_TR = F.normalize(F.linear(x, self.w_gate.weight.float()), dim=1)
        return self.temperature.float().exp() * F.linear(u_TR, F.normalize(self.expert_centroids.float(), dim=1))


class MoLlamaBlock(RoutedBlock):
    """MoLlama's."""

    def make(self, d: int, f: int) -> None:
        """Make the weights."""
        e = self.num_experts
        self.gate = _MoLlamaGate(self.config, d, e)
        self.gate_proj, self.up_proj, self.down_proj = _Stacked(e, d, f), _Stacked(e, d, f), _Stacked(e, f, d)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) in fp32."""
        z_TE: Tensor = self.gate(x_TD)
        return z_TE

    def run(self, x: Tensor, expert: int) -> Tensor:
        """One expert."""
        hidden = F.silu(x @ self.gate_proj.weight[expert]) * (x @ self.up_proj.weight[expert])
        return hidden @ self.down_proj.weight[expert]


class NormedLinear(nn.Linear):
    """A projection whose output is normed by a module that belongs to its owner: of each head, or of all together."""

    def __init__(self, old: nn.Linear, norm: nn.Module) -> None:
        super().__init__(old.in_features, old.out_features, bias=old.bias is not None)
        self.norm = [norm]  # in a list, so that it has one name only

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        norm = self.norm[0]
        normed: Tensor = norm(y.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)
        return normed


class _Elsewhere(nn.Module):
    """A module that stands under another name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = [module]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module[0](x)
        return y


class _Loading:
    """How weights that transformers does not know begin."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (_Stacked, _MoLlamaGate)):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, mean=0.0, std=self.config.initializer_range)  # type: ignore[attr-defined]


class RoutedModel(_Loading, LlamaModel):
    """LLaMA's decoder stack with a mixture of experts in the layers that have them."""

    config_class = RoutedConfig
    block: type[RoutedBlock] = RoutedBlock
    block_name = "mlp"

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        for index, i in enumerate(config.moe_layers()):
            block = self.block(config, index)
            if self.block_name != "mlp":
                self.layers[i].add_module(self.block_name, block)
            self.layers[i].mlp = block if self.block_name == "mlp" else _Elsewhere(block)
        for i, condensed in (config.condensed_layers or {}).items():
            layer = self.layers[int(i)]
            if condensed["width"]:
                layer.mlp = CondensedFFN(config.hidden_size, **condensed)
            else:
                layer.mlp, layer.post_attention_layernorm = NoFFN(), nn.Identity()
        for layer in self.layers:
            attention = layer.self_attn
            if config.qkv_bias_only:
                old = attention.o_proj
                attention.o_proj = nn.Linear(old.in_features, old.out_features, bias=False)
            for name in ("q", "k") if config.qk_norm else ():
                old = getattr(attention, f"{name}_proj")
                size = attention.head_dim if config.qk_norm == "head" else old.out_features
                norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
                attention.add_module(f"{name}_norm", norm)
                setattr(attention, f"{name}_proj", NormedLinear(old, norm))
        self.post_init()


class RoutedForCausalLM(_Loading, LlamaForCausalLM):
    """The decoder stack and its language-model head."""

    config_class = RoutedConfig
    stack: type[RoutedModel] = RoutedModel

    def __init__(self, config: RoutedConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's own would build a dense model first
        self.model = self.stack(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MixtralC2RModel(RoutedModel):
    """Mixtral."""

    config_class = MixtralC2RConfig
    block = MixtralBlock
    block_name = "block_sparse_moe"


class MixtralC2RForCausalLM(RoutedForCausalLM):
    """Mixtral with its head."""

    config_class = MixtralC2RConfig
    stack = MixtralC2RModel


class Qwen2MoeC2RModel(RoutedModel):
    """Qwen1.5-MoE and Qwen2-MoE."""

    config_class = Qwen2MoeC2RConfig
    block = Qwen2MoeBlock


class Qwen2MoeC2RForCausalLM(RoutedForCausalLM):
    """The same with its head."""

    config_class = Qwen2MoeC2RConfig
    stack = Qwen2MoeC2RModel


class Qwen3MoeC2RModel(RoutedModel):
    """Qwen3-MoE."""

    config_class = Qwen3MoeC2RConfig


class Qwen3MoeC2RForCausalLM(RoutedForCausalLM):
    """The same with its head."""

    config_class = Qwen3MoeC2RConfig
    stack = Qwen3MoeC2RModel


class OlmoeC2RModel(RoutedModel):
    """OLMoE."""

    config_class = OlmoeC2RConfig


class OlmoeC2RForCausalLM(RoutedForCausalLM):
    """The same with its head."""

    config_class = OlmoeC2RConfig
    stack = OlmoeC2RModel


class DeepseekModel(RoutedModel):
    """DeepSeekMoE 16B."""

    config_class = DeepseekConfig
    block = DeepseekBlock


class DeepseekForCausalLM(RoutedForCausalLM):
    """The same with its head."""

    config_class = DeepseekConfig
    stack = DeepseekModel


class MoLlamaModel(RoutedModel):
    """MoLlama."""

    config_class = MoLlamaConfig
    block = MoLlamaBlock


class MoLlamaForCausalLM(RoutedForCausalLM):
    """The same with its head."""

    config_class = MoLlamaConfig
    stack = MoLlamaModel


__all__ = [
    "DeepseekForCausalLM",
    "DeepseekModel",
    "MixtralC2RForCausalLM",
    "MixtralC2RModel",
    "MoLlamaForCausalLM",
    "MoLlamaModel",
    "OlmoeC2RForCausalLM",
    "OlmoeC2RModel",
    "Qwen2MoeC2RForCausalLM",
    "Qwen2MoeC2RModel",
    "Qwen3MoeC2RForCausalLM",
    "Qwen3MoeC2RModel",
]
