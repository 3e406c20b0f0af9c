"""Small MoE layers for tests: weights by logical expert, so that any placement and any rank makes the same layer."""

from typing import Any

import torch
from torch import Tensor

from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.transport import Alone, Link, Transport

D, F = 36, 20  # rows that are no multiple of a cache line


def shuffled_placement(num_experts: int, devices: int, *, seed: int = 3) -> Placement:
    """A placement in which neither devices nor slots follow the ids."""
    contiguous = Placement.contiguous(num_experts, devices, 1)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)).tolist()
    slots = [order[expert] if expert >= 0 else -1 for expert in contiguous.layers[0]]
    return contiguous.model_copy(update={"layers": [slots]})


def make_layer(
    num_experts: int,
    top_k: int,
    devices: int,
    *,
    transport: Transport | None = None,
    dtype: torch.dtype = torch.float32,
    one_row_per_copy: bool = False,
    tiers: list[str] | None = None,
) -> MoELayer:
    """This rank's part of a layer with random weights, the same on every call."""
    transport = transport or Alone()
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, expert_hidden_size=F, gate="mlp", score_scale=2.0)
    placement = shuffled_placement(num_experts, devices)
    layer = MoELayer(moe, D, 0)
    cut = placement.cut(transport.size)
    site = Site.of(placement, 0, cut, transport.rank, one_row_per_copy=one_row_per_copy)
    layer.join(site, Link(transport, Ledger(tiers or ["self"] * transport.size), 0))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for parameter in layer.experts.parameters():
            whole = torch.randn(num_experts, *parameter.shape[1:], generator=generator) * 0.2
            for row, expert in enumerate(site.experts_here()):
                parameter[row] = whole[expert] if expert >= 0 else 0.0
    layer.experts.to(dtype)
    return layer


class Fixed:
    """A rule that answers with ids given beforehand."""

    def __init__(self, ids_TK: Tensor) -> None:
        self.ids_TK = ids_TK

    def select(self, scores_TE: Tensor) -> Tensor:
        """The ids, whatever the scores."""
        return self.ids_TK[: len(scores_TE)]


def set_routing(layer: Any, ids_TK: Tensor) -> None:
    """Let a layer route by these ids."""
    layer.router.rule = Fixed(ids_TK)
