"""The optimiser: fused AdamW on sharded weights, and the gradient norm over all ranks."""

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
_GATES = (".router.", ".shared_gate.", ".residual.gate.", ".residual_weighting.")


def make_optimizer(stages: Sequence[Decoder], train: TrainSection) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101, of what is trained, with its moments made at once, so that a checkpoint can be loaded
    into them.
    """
    trained = [(name, p) for name, p in named_parameters(stages) if p.requires_grad]
    of_gates = 1.0 if train.gate_learning_rate is None else train.gate_learning_rate / train.learning_rate
    # Groups of one kind: the fused step takes DTensors or plain tensors.
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for name, parameter in trained:
        kind = parameter.ndim >= 2, isinstance(parameter, DTensor), any(part in name for part in _GATES)
        groups.setdefault(kind, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": of_kind,
                "weight_decay": train.weight_decay if is_matrix else 0.0,
                "share": of_gates if is_gate else 1.0,
            }
            for (is_matrix, _, is_gate), of_kind in groups.items()
        ]
        or [{"params": [], "share": 1.0}],  # a stage that is frozen as a whole
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        fused=True,
    )
    for _, parameter in trained:
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
        trained = ((name, p) for name, p in named_parameters(stages) if p.requires_grad)
        tensors = {name: optimizer.state[p][moment] for name, p in trained}
        entries |= entries_of(stages, tensors, f"{moment}/", experts=experts)
    return entries


def set_step(optimizer: torch.optim.AdamW, step: int) -> None:
    """Tell AdamW how many steps its moments have seen, for the correction of their bias."""
    for state in optimizer.state.values():
        state["step"].fill_(step)


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Of the next step; gates have their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def sum_over_ranks(
    loss: Tensor, stages: Sequence[Decoder], group: dist.ProcessGroup, more: float = 0.0
) -> tuple[float, float, float]:
    """The loss and the gradient norm of all ranks, and the sum of `more`, which travels along.

    Args:
        loss: this rank's share of the loss, a scalar.
        stages: after the backward pass.
        group: all ranks.
        more: a number of this rank.
    """
    own = (p for stage in stages for name, p in stage.named_parameters() if name not in stage.copies)
    loss = loss.detach().float()
    squares = [_local(p.grad).float().square().sum() / _copies(p.grad) for p in own if p.grad is not None]
    square = torch.stack(squares).sum() if squares else torch.zeros_like(loss)
    sums = torch.stack((loss, square, torch.full_like(loss, more)))
    with part("waiting"):
        dist.all_reduce(sums, group=group)
    total, squared, of_all = sums.tolist()
    return total, math.sqrt(squared) if squared >= 0 else math.nan, of_all


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
