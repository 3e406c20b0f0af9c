"""LLaMA-MoE with constrained routing, for `trust_remote_code` in transformers 4.48 to 5.x.

    tokens -> gate -> selection rule -> experts -> weighted sum

Everything but the FFN is transformers' own LLaMA, so that cache, attention backends and `generate` work unchanged.
Parameter names are those of the published LLaMA-MoE v1 checkpoints.

Shape suffixes: T tokens, D model dim, E experts, K experts chosen per token, F hidden width of an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from .configuration_llama_moe import LlamaMoEConfig

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 48):
    raise ImportError(
        f"transformers {transformers.__version__} takes keys that contain weight_g for those of a weight norm and "
        "loses the experts' weight_gate; install transformers 4.48 or later"
    )


def select_experts(
    scores_TE: Tensor,
    top_k: int,
    *,
    list_EE: Tensor | None = None,
    top_t: int = 0,
    device_E: Tensor | None = None,
    max_devices: int = 0,
) -> Tensor:
    """Choose the experts of every token; equal scores go to the lower expert id.

    Args:
        scores_TE: (T, E) fp32, any order-preserving function of the router's logits.
        top_k: K in 1..E.
        list_EE: (E, E) int64; row i lists all experts, closest collaborator of i first, i last. None: plain top-k.
        top_t: T of C2R in K-1..E-1: the candidates are the first T of the row of the top-1 expert.
        device_E: (E,) int64, the device of every expert, in 0.., or its group; None: no bound on devices.
        max_devices: M: the experts of a token live on at most M devices, the top-1 expert's among them. Candidates
            outside are dropped; if fewer than K-1 remain, the row is followed further, inside those devices.

    Returns:
        (T, K) int64, column 0 the top-1 expert, the others by falling score.
    """
    order_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
    first_T1 = order_TE[:, :1]
    if top_k == 1 or (list_EE is None and device_E is None):
        return order_TE[:, :top_k]
    if list_EE is None:
        outside_TE = ~_on_first_devices(order_TE, device_E, max_devices).gather(1, order_TE)
        return order_TE.gather(1, outside_TE.to(torch.uint8).sort(dim=1, stable=True).indices)[:, :top_k]
    row_TE = list_EE[first_T1[:, 0]][:, :-1]  # the top-1 expert itself stands last and is no candidate
    inside_TE = torch.ones_like(row_TE, dtype=torch.bool)
    if device_E is not None:
        inside_TE = _on_first_devices(order_TE, device_E, max_devices).gather(1, row_TE)
    near = torch.arange(row_TE.shape[1], device=row_TE.device) < top_t
    open_TE = inside_TE & (near | (inside_TE.cumsum(dim=1) <= top_k - 1))
    candidate_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, row_TE, open_TE)
    # A stable sort of "is no candidate" along the score order brings the candidates forward and keeps their order.
    forward_TE = (~candidate_TE.gather(1, order_TE)).to(torch.uint8).sort(dim=1, stable=True).indices
    return torch.cat((first_T1, order_TE.gather(1, forward_TE)[:, : top_k - 1]), dim=1)


def _on_first_devices(order_TE: Tensor, device_E: Tensor, max_devices: int) -> Tensor:
    """(T, E) bool: the expert lives on one of the first `max_devices` distinct devices named along the score order."""
    num_experts = order_TE.shape[1]
    position_TE = torch.empty_like(order_TE).scatter(
        1, order_TE, torch.arange(num_experts, device=order_TE.device).expand_as(order_TE)
    )
    device_TE = device_E.expand_as(order_TE)
    named_at_TP = torch.full_like(order_TE, num_experts)  # a device id is at most E - 1 after renumbering
    named_at_TP = named_at_TP.scatter_reduce(1, device_TE, position_TE, reduce="amin")
    rank_TP = named_at_TP.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank_TP.gather(1, device_TE) < max_devices


class LlamaMoEGate(nn.Module):
    """Logits of the experts in fp32, whatever the dtype of the weights."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.num_experts
        linear = nn.Linear(d, e, bias=False)
        mlp = config.gate_network == "mlp"
        self.gate_network = nn.Sequential(linear, nn.Tanh(), nn.Linear(e, e, bias=False)) if mlp else linear

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.float()
        linears = [module for module in self.gate_network.modules() if isinstance(module, nn.Linear)]
        logits = F.linear(x, linears[0].weight.float())
        for linear in linears[1:]:
            logits = F.linear(torch.tanh(logits), linear.weight.float())
        return logits


class LlamaMoEExperts(nn.Module):
    """The weights of all experts of a layer, under their published names."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.expert_size()

        def weights(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(config.num_experts))

        self.weight_gate, self.weight_up, self.weight_down = weights(f, d), weights(f, d), weights(d, f)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        hidden = F.silu(F.linear(x, self.weight_gate[expert])) * F.linear(x, self.weight_up[expert])
        return F.linear(hidden, self.weight_down[expert])


class LlamaMoECalculator(nn.Module):
    """Weighted sum of the chosen experts in fp32; no token is dropped."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.experts = LlamaMoEExperts(config)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for expert in torch.unique(ids_TK).tolist():
            token, slot = (ids_TK == expert).nonzero(as_tuple=True)
            y = self.experts(x_TD[token], expert).float()
            y_TD = y_TD.index_add(0, token, y * weights_TK[token, slot, None])
        return y_TD.to(x_TD.dtype)


class LlamaMoEBlock(nn.Module):
    """The mixture of experts that stands in the place of LLaMA's FFN."""

    def __init__(self, config: LlamaMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = LlamaMoEGate(config)
        self.calculator = LlamaMoECalculator(config)
        self._tables: tuple[torch.device, dict[str, Any]] | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.gate(x_TD)
        # Softmax keeps the order; the logits themselves are compared, so that no two scores round together.
        ids_TK = select_experts(logits_TE.detach(), self.config.num_selects, **self._routing_tables(x_TD.device))
        weights_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=1) * self.config.score_scale_factor
        y_TD: Tensor = self.calculator(x_TD, ids_TK, weights_TK)
        return y_TD.reshape(hidden_states.shape)

    def _routing_tables(self, device: torch.device) -> dict[str, Any]:
        """This layer's arguments of `select_experts`.

        Not buffers: `from_pretrained` builds modules on the meta device and would leave unsaved buffers without values.
        """
        if self._tables is None or self._tables[0] != device:
            # Tables first made inside inference_mode could not be used in training later.
            with torch.inference_mode(False):
                self._tables = (device, self._make_tables(device))
        return self._tables[1]

    def _make_tables(self, device: torch.device) -> dict[str, Any]:
        config = self.config
        if config.routing_rule == "group_limited":
            groups = torch.arange(config.num_experts, device=device) * config.num_groups // config.num_experts
            return {"device_E": groups, "max_devices": self._of_layer(config.max_devices)}
        if config.routing_rule == "topk" or config.collaborative_list is None:
            return {}
        rows_EE = torch.tensor(config.collaborative_list[self.layer], device=device)
        tables = {"list_EE": rows_EE, "top_t": self._of_layer(config.top_t)}
        if config.routing_rule == "c2r_grouped" and config.device_of_expert is not None:
            devices = torch.tensor(config.device_of_expert[self.layer])
            renumbered = torch.unique(devices, return_inverse=True)[1].to(device)
            tables |= {"device_E": renumbered, "max_devices": self._of_layer(config.max_devices)}
        return tables

    def _of_layer(self, value: Any) -> Any:
        """A field that is one value, or a list with one for every layer."""
        return value[self.layer] if isinstance(value, list) else value


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


class LlamaMoEModel(_LlamaMoELoading, LlamaModel):
    """LLaMA's decoder stack with a mixture of experts in every layer."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.mlp = LlamaMoEBlock(config, i)
        self.post_init()


class LlamaMoEForCausalLM(_LlamaMoELoading, LlamaForCausalLM):
    """The decoder stack and its language-model head."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's own would build a dense model first
        self.model = LlamaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["LlamaMoEForCausalLM", "LlamaMoEModel"]
