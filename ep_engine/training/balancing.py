"""Balancing: what a run adds to a model's routers while it trains, and the biases that it moves between steps."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ep_engine.balance_losses import BalanceLoss, losses_of
from ep_engine.capacity import Capacity
from ep_engine.config import BalanceSection
from ep_engine.model import Decoder


def balance(
    stages: Sequence[Decoder], section: BalanceSection, *, seed: int, has_padding: bool, stage: dist.ProcessGroup
) -> dict[str, tuple[float, BalanceLoss]]:
    """Have the routers add noise, drop what is beyond their capacity, and sum up what losses need.

    Args:
        stages: of this rank.
        section: what a run asks for.
        seed: of the noise.
        has_padding: whether some tokens are padding.
        stage: the ranks that share a batch.

    Returns:
        The losses, by name, with their coefficients.
    """
    losses = losses_of(section)
    for moe in (moe for model in stages for moe in model.moe_layers().values()):
        moe.losses = tuple(kind for _, kind in losses.values())
        moe.has_padding = has_padding and not section.reference_compat
        if section.noise:
            moe.router.add_noise(seed)
        if section.gumbel:
            moe.router.gumbel_seed = seed
        if section.capacity_factor is not None:
            moe.router.capacity = Capacity(section.capacity_factor, stage)
    return losses


def needs_numbers(section: BalanceSection) -> bool:
    """Whether routers must know which tokens they see."""
    return section.noise or section.gumbel or section.capacity_factor is not None


@torch.no_grad()
def move_biases(stages: Sequence[Decoder], load_LE: Tensor, rate: float, stage: dist.ProcessGroup) -> None:
    """Raise the bias of experts that were less busy than the mean in a step, lower that of others, by `rate`.

    arXiv:2408.15664, algorithm 1. All ranks of the stage call this.

    Args:
        stages: of this rank.
        load_LE: loads of this rank's tokens, a row for each layer with experts.
        rate: u.
        stage: the ranks that share a batch.
    """
    load_LE = load_LE.clone()
    dist.all_reduce(load_LE, group=stage)
    for model in stages:
        for i, moe in model.moe_layers().items():
            bias = moe.router.bias
            assert bias is not None, "resolve has asked for it"
            load_E = load_LE[model.config.moe_index(i), : bias.numel()]
            _add(bias, rate * torch.sign(load_E.mean() - load_E))


def _add(parameter: Tensor, change: Tensor) -> None:
    """To the part of a weight that lies here."""
    if not isinstance(parameter, DTensor):
        parameter.add_(change)
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    parameter.to_local().add_(change[offset[0] : offset[0] + shape[0]])
