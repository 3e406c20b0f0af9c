"""A model run layer by layer, each weight read when it is its turn, in float32: for models of any size, and few tokens.

Attention and router are the engine's own modules; experts and FFNs are computed one after the other.

Shape letters:  B rows   S positions   T = B * S tokens   D model dim
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine.attention import Attention, Positions
from ep_engine.deferred import Tensors
from ep_engine.feed_forward import FeedForward
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.norm import RMSNorm
from ep_engine.reference import swiglu
from ep_engine.router import Router, Routing


@torch.no_grad()
def outputs(
    config: ModelConfig, tensors: Tensors, tokens_BS: Tensor, *, all_experts: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """What each part of the model puts out: `embedding`, `layer 0`, ..., each (B, S, D), and `logits` (B, S, V).

    Args:
        config: the model.
        tensors: its entries, of any float dtype.
        tokens_BS: ids.
        all_experts: every expert is on, with weight 1, whatever the router says.
    """
    x_BSD = F.embedding(tokens_BS, tensors["embed.weight"]).float()
    yield "embedding", x_BSD
    positions = Positions(config)
    for layer in range(config.num_layers):
        x_BSD = attended(x_BSD, config, tensors, positions, layer)
        x_BSD = x_BSD + feed_forward(x_BSD, config, tensors, layer, all_experts=all_experts)
        yield f"layer {layer}", x_BSD
    head = tensors["embed.weight" if config.tie_embeddings else "head.weight"]
    yield "logits", F.linear(normed(x_BSD, config, tensors, "norm"), head.float())


def attended(x_BSD: Tensor, config: ModelConfig, tensors: Tensors, positions: Positions, layer: int) -> Tensor:
    """The residual stream after a layer's attention."""
    return attention_of(config, tensors, positions, layer)(x_BSD)


def attention_of(config: ModelConfig, tensors: Tensors, positions: Positions, layer: int) -> Callable[[Tensor], Tensor]:
    """`attended` of one layer for several inputs, its weights read once."""
    at = f"layers.{layer}"
    norm = _filled(RMSNorm(config.hidden_size, config.rms_norm_eps), tensors, f"{at}.attention_norm")
    attention = _filled(Attention(config, positions), tensors, f"{at}.attention")
    return lambda x_BSD: x_BSD + attention(norm(x_BSD))


def feed_forward(
    x_BSD: Tensor, config: ModelConfig, tensors: Tensors, layer: int, *, all_experts: bool = False
) -> Tensor:
    """What a layer's FFN or experts add to the residual stream after attention."""
    at = f"layers.{layer}"
    moe = config.moe_of(layer)
    if moe is None and config.dense_size(layer) == 0:
        return torch.zeros_like(x_BSD)
    h_TD = normed(x_BSD, config, tensors, f"{at}.ffn_norm").flatten(0, 1)
    if layer in config.condensed:
        condensed = config.condensed[layer]
        ffn = FeedForward(config.hidden_size, config.dense_size(layer), condensed=condensed)
        y_TD: Tensor = _filled(ffn, tensors, f"{at}.ffn")(h_TD)
    elif moe is None:
        y_TD = _ffn(h_TD, tensors, f"{at}.ffn", ".weight", bias=config.mlp_bias)
    else:
        y_TD = _mixture(h_TD, config, moe, layer, tensors, all_experts=all_experts)
    return y_TD.view_as(x_BSD)


def normed(x: Tensor, config: ModelConfig, tensors: Tensors, at: str) -> Tensor:
    """RMSNorm with the weights of entry `at`."""
    y: Tensor = _filled(RMSNorm(config.hidden_size, config.rms_norm_eps), tensors, at)(x)
    return y


def _filled(module: nn.Module, tensors: Tensors, at: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[f"{at}.{name}"])
    return module


def _ffn(x: Tensor, tensors: Tensors, at: str, suffix: str = "", *, bias: bool = False) -> Tensor:
    weights = [tensors[f"{at}.{name}{suffix}"].float() for name in ("w_gate", "w_up", "w_down")]
    if not bias:
        return swiglu(x, *weights)
    b_gate, b_up, b_down = (tensors[f"{at}.{name}.bias"].float() for name in ("w_gate", "w_up", "w_down"))
    return F.linear(F.silu(F.linear(x, weights[0], b_gate)) * F.linear(x, weights[1], b_up), weights[2], b_down)


def _mixture(
    x_TD: Tensor, config: ModelConfig, moe: MoEConfig, layer: int, tensors: Tensors, *, all_experts: bool
) -> Tensor:
    if all_experts:
        shares_TE = torch.ones(len(x_TD), moe.num_experts)
    else:
        chosen = routed(x_TD, config, layer, tensors)
        shares_TE = torch.zeros(len(x_TD), moe.num_experts).scatter_(1, chosen.ids_TK, chosen.weights_TK)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(moe.num_experts):
        here = shares_TE[:, expert].nonzero()[:, 0]
        if len(here):
            y_TD[here] += shares_TE[here, expert, None] * expert_output(x_TD[here], layer, expert, tensors)
    beside_TD = beside(x_TD, moe, layer, tensors, all_experts=all_experts)
    if moe.residual_weighting and not all_experts:
        weight = tensors[f"layers.{layer}.moe.residual_weighting.weight"].float()
        shares_T2 = F.linear(x_TD, weight).softmax(dim=1)
        return shares_T2[:, :1] * y_TD + shares_T2[:, 1:] * beside_TD
    return y_TD + beside_TD


def routed(x_TD: Tensor, config: ModelConfig, layer: int, tensors: Tensors) -> Routing:
    """Which experts the tokens of a layer with experts choose, by their normed inputs."""
    moe = config.moe_of(layer)
    assert moe is not None, "the caller has asked"
    router = Router(moe, config.hidden_size, config.moe_index(layer))
    found: Routing = _filled(router, tensors, f"layers.{layer}.moe.router")(x_TD)
    return found


def expert_output(x_TD: Tensor, layer: int, expert: int, tensors: Tensors) -> Tensor:
    """What one expert makes of normed inputs, not weighted."""
    return _ffn(x_TD, tensors, f"layers.{layer}.moe.experts.{expert}")


def beside(x_TD: Tensor, moe: MoEConfig, layer: int, tensors: Tensors, *, all_experts: bool = False) -> Tensor:
    """What every token of a layer goes through beside the experts that it chooses, not weighed against them; zeros if
    there is nothing.
    """
    at = f"layers.{layer}.moe"
    y_TD = torch.zeros_like(x_TD)
    if moe.shared_hidden_size:
        shared_TD = _ffn(x_TD, tensors, f"{at}.shared", ".weight")
        if moe.shared_gate:
            shared_TD = F.linear(x_TD, tensors[f"{at}.shared_gate.weight"].float()).sigmoid() * shared_TD
        y_TD = y_TD + shared_TD
    if moe.residual_experts:
        shares_TR = F.linear(x_TD, tensors[f"{at}.residual.gate.weight"].float()).softmax(dim=1) * moe.residual_scale
        if all_experts:
            shares_TR = torch.ones_like(shares_TR)
        for expert in range(moe.residual_experts):
            each_TD = _ffn(x_TD, tensors, f"{at}.residual.each.{expert}", ".weight")
            y_TD = y_TD + shares_TR[:, expert, None] * each_TD
    return y_TD
