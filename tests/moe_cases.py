"""Small MoE layers for tests: weights by logical expert, so that any placement and any rank makes the same layer."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.router import Choice
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Alone, Collective, Link, Transport

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
    links: tuple[Link, ...] = (),
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    one_row_per_copy: bool = False,
    fp8: bool = False,
    fixed_rows: int | None = None,
) -> MoELayer:
    """This rank's part of a layer with random weights, the same on every call."""
    links = links or (Link(Alone(), Ledger(), 0),)
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, expert_hidden_size=F, gate="mlp", score_scale=2.0)
    placement = shuffled_placement(num_experts, devices)
    layer = MoELayer(moe, D, 0)
    ep_size = math.prod(link.transport.size for link in links)
    site = Site.of(placement, 0, ep_size, rank, one_row_per_copy=one_row_per_copy)
    layer.join(site, *links, fp8=fp8, fixed_rows=fixed_rows)
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


def links_between(name: str, rank: int, world_size: int, per_node: int = 2) -> tuple[Link, ...]:
    """Links of one layer over all ranks; hierarchical: as if every `per_node` of them were a node."""
    world = dist.group.WORLD
    ledger = Ledger(["self" if r == rank else "node" for r in range(world_size)])
    if world_size == 1:
        return (Link(Alone(), ledger, 0),)
    if name == "collective":
        return (Link(Collective(world), ledger, 0),)
    if name == "shared_memory":
        return (Link(SharedMemory(world, 60.0), ledger, 0),)
    num_nodes = world_size // per_node
    ledger.tier_of_rank = ["self" if r == rank else TIER[r // per_node == rank // per_node] for r in range(world_size)]
    insides = [dist.new_group([n * per_node + i for i in range(per_node)]) for n in range(num_nodes)]
    acrosses = [dist.new_group([n * per_node + i for n in range(num_nodes)]) for i in range(per_node)]
    downs = [dist.new_group([n * per_node + i for n in range(num_nodes)]) for i in range(per_node)]
    across: Transport = Collective(acrosses[rank % per_node], downs[rank % per_node])
    inside: Transport = SharedMemory(insides[rank // per_node], 60.0)
    return tuple(
        Link(transport, ledger, 0, ["self" if r == transport.rank else tier for r in range(transport.size)])
        for transport, tier in ((across, "network"), (inside, "node"))
    )


TIER = {True: "node", False: "network"}


def set_routing(layer: Any, ids_TK: Tensor) -> None:
    """Let a layer route by these ids."""
    layer.router.register_forward_pre_hook(lambda _, given: (given[0], None, Choice(ids_TK[: len(given[0])], None)))
