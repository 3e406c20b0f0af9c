"""The optimiser: fused AdamW on sharded weights, a cosine schedule, and the gradient norm over all ranks."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ep_engine.config import TrainSection
from ep_engine.entries import Shard
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of, named_parameters
from ep_engine.stopwatch import part

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(stages: Sequence[Decoder], train: TrainSection) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101, with its moments made at once, so that a checkpoint can be loaded into them."""
    parameters = [p for _, p in named_parameters(stages)]
    # Groups of one kind: the fused step takes DTensors or plain tensors.
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.ndim >= 2, isinstance(parameter, DTensor)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": of_kind, "weight_decay": train.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), of_kind in groups.items()
        ],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        fused=True,
    )
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        step = torch.zeros((), dtype=torch.float32, device=_local(parameter).device)
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


def moment_entries(
    stages: Sequence[Decoder], optimizer: torch.optim.AdamW, *, experts: DeviceMesh | None = None
) -> dict[str, Shard]:
    """Checkpoint entries of both moments, `exp_avg/<entry of the weight>` and `exp_avg_sq/...`; see `entries_of`."""
    entries: dict[str, Shard] = {}
    for moment in _MOMENTS:
        tensors = {name: optimizer.state[p][moment] for name, p in named_parameters(stages)}
        entries |= entries_of(stages, tensors, f"{moment}/", experts=experts)
    return entries


def set_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Tell AdamW how many steps its moments have seen, for the correction of their bias."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def learning_rate(train: TrainSection, step: int) -> float:
    """Rate of step 0..steps-1: linear warm-up, then half a cosine down to the minimum at the last step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    span = max(train.steps - 1 - train.warmup_steps, 1)  # one step after warm-up has the peak rate
    falling = 0.5 * (1 + math.cos(math.pi * min((step - train.warmup_steps) / span, 1.0)))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * falling


def sum_over_ranks(loss: Tensor, stages: Sequence[Decoder], group: dist.ProcessGroup) -> tuple[float, float]:
    """The loss and the gradient norm of all ranks.

    Args:
        loss: this rank's share of the loss, a scalar.
        stages: after the backward pass.
        group: all ranks.
    """
    own = (p for stage in stages for name, p in stage.named_parameters() if name not in stage.copies)
    grads = [p.grad for p in own if p.grad is not None]
    squares = torch.stack([_local(grad).float().square().sum() / _copies(grad) for grad in grads]).sum()
    both = torch.stack((loss.detach().float(), squares))
    with part("waiting"):
        dist.all_reduce(both, group=group)
    total, square = both.tolist()
    return total, math.sqrt(square) if square >= 0 else math.nan


def clip_gradients(stages: Sequence[Decoder], norm: float, largest: float) -> None:
    """Scale all gradients so that their global norm is at most `largest`."""
    if norm > largest:
        for _, parameter in named_parameters(stages):
            if parameter.grad is not None:
                _local(parameter.grad).mul_(largest / norm)


def _copies(tensor: Tensor) -> int:
    """Ranks that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_replicate())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
