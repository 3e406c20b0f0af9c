"""Combine: bring one row per visited rank home and sum a token's rows.

    tokens -> router -> plan -> dispatch -> experts -> [combine]

The experts' weighted sums were taken where they are. All these sums run along the placement's tree: a group adds its
children in their order in float32 and rounds to the dtype of the rows, own rows included. So it makes no difference
where the tree is cut into ranks.

Shape letters as in ops.py.
"""

from typing import Any

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.dispatch import Arrival, stays_here, sum_at_home
from ep_engine.message import Message
from ep_engine.plan import Plan
from ep_engine.stopwatch import timed


@timed("combine")
def combine(z_RD: Tensor, arrival: Arrival) -> Tensor:
    """Sum the experts' outputs of each token of this rank.

    Args:
        z_RD: for each row of `arrival`, the weighted sum of the outputs of its experts here.
        arrival: from `dispatch`.

    Returns:
        (T, D) in the dtype of z_RD.
    """
    y_TD: Tensor = _Combine.apply(z_RD, arrival.plans)  # type: ignore[no-untyped-call]
    return y_TD


class _Combine(torch.autograd.Function):
    """Rows (R, D) where the experts live -> sums (T, D) at home."""

    @staticmethod
    def forward(ctx: Any, z_RD: Tensor, plans: tuple[Plan, ...]) -> Tensor:
        ctx.plans = plans
        for plan in reversed(plans):
            z_RD = _carry_home(z_RD, plan)
        return z_RD

    @staticmethod
    @timed("combine")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        for plan in ctx.plans:
            grad = _carry_gradients_out(grad, plan)
        return grad, None


def _carry_home(z_RD: Tensor, plan: Plan) -> Tensor:
    """One hop back: a token's rows, summed, (T, D)."""
    message = Message(z_RD.shape[1], z_RD.dtype)
    if stays_here(plan):
        plan.hop.link.record(plan.recv_rows, message.num_bytes, "combine")
        return z_RD
    link = plan.hop.link
    exchange = link.begin(plan.recv_rows, plan.send_rows, message.num_bytes, z_RD.device, "combine")
    everything = torch.arange(len(z_RD), dtype=torch.int32, device=z_RD.device)
    for part, out in exchange.parts:
        ops.gather_rows(z_RD, everything[part], out=message.rows(out), streaming=exchange.streaming)
    return sum_at_home(message.rows(link.finish(exchange)), plan)


def _carry_gradients_out(grad_TD: Tensor, plan: Plan) -> Tensor:
    """One hop out: each row gets its token's gradient, (R, D)."""
    message = Message(grad_TD.shape[1], grad_TD.dtype)
    link = plan.hop.link
    if stays_here(plan):
        link.record(plan.send_rows, message.num_bytes, "combine_backward")
        return grad_TD
    exchange = link.begin(plan.send_rows, plan.recv_rows, message.num_bytes, grad_TD.device, "combine_backward")
    for part, out in exchange.parts:
        ops.gather_rows(grad_TD, plan.row_token_S[part], out=message.rows(out), streaming=exchange.streaming)
    return message.rows(link.finish(exchange))
