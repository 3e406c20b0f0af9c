"""Gradients of weights in a node of their own, which a schedule may run later without a second run of what is before.

torch's zero-bubble schedules go through the graph twice, for the inputs and for the weights of a stage; a node that
gives both would run twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Handover:
    """What the backward of the rows leaves for that of the weights: a call that gives their gradients, in order."""

    weight_grads: Callable[[], tuple[Tensor, ...]] | None = None


def tie(x: Tensor, handover: Handover, *weights: Tensor) -> Tensor:
    """x, unchanged; after its gradient has passed, `handover` gives those of `weights`.

    What x goes into must use `weights` detached, and fill the handover in its backward.
    """
    ticket = _WeightGrads.apply(handover, *weights)  # type: ignore[no-untyped-call]
    y: Tensor = _Join.apply(x, ticket)  # type: ignore[no-untyped-call]
    return y


class _WeightGrads(torch.autograd.Function):
    """Nothing forward; backward the gradients of the weights. Its output is a ticket that ties them to the rows."""

    @staticmethod
    def forward(ctx: Any, handover: Handover, *weights: Tensor) -> Tensor:
        ctx.handover = handover
        return weights[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_grads, ctx.handover.weight_grads = ctx.handover.weight_grads, None
        assert weight_grads is not None, "the backward of the rows runs first"
        return None, *weight_grads()


class _Join(torch.autograd.Function):
    """The rows, unchanged; their gradient also sets off that of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ticket: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(())
