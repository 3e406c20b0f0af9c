"""Combine: weight and sum the experts' outputs where they are, bring one row per visited rank home, sum those.

    tokens -> router -> plan -> dispatch -> experts -> [combine]

Both sums run along the placement's tree: a group adds its children in their order in float32 and rounds to the dtype
of the rows, own rows included. So it makes no difference where the tree is cut into ranks.

Shape letters as in ops.py.
"""

from typing import Any

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.dispatch import Arrival, leaf_of_visit
from ep_engine.plan import Plan
from ep_engine.transport import Link


def combine(y_ND: Tensor, weights_TK: Tensor, arrival: Arrival, plan: Plan, link: Link) -> Tensor:
    """Sum the experts' outputs of each token of this rank.

    Args:
        y_ND: outputs for `arrival.x_ND`, in its dtype.
        weights_TK: float32 combine weights at home; used only where each copy travels by itself.
        arrival: from `dispatch`.
        plan: the plan of the same forward pass.
        link: this layer's end of the transport.

    Returns:
        (T, D) in the dtype of y_ND.
    """
    if arrival.weights_RW is None:
        z_RD = _Arrange.apply(y_ND, arrival)  # type: ignore[no-untyped-call]
        # Columns of a token stand in the order of expert ids.
        choice_TC = plan.row_choice_SW[:, 0].long()[plan.visit_row_TC.long()]
        weights_TC = weights_TK.gather(1, choice_TC)
    else:
        sizes = plan.site.cut.group_sizes_of_slots
        z_RD = _Weigh.apply(y_ND, arrival.weights_RW, arrival, sizes)  # type: ignore[no-untyped-call]
        weights_TC = None
    y_TD: Tensor = _Home.apply(z_RD, weights_TC, plan, link)  # type: ignore[no-untyped-call]
    return y_TD


class _Arrange(torch.autograd.Function):
    """Outputs by slot (N, D) -> by arrived row (R, D), one copy per row."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, arrival: Arrival) -> Tensor:
        ctx.copy_row_N = arrival.copy_row_N
        return ops.gather_rows(y_ND, arrival.position_RW.reshape(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ops.gather_rows(grads[0], ctx.copy_row_N), None


class _Weigh(torch.autograd.Function):
    """Outputs by slot (N, D), weights (R, W) -> weighted sums of each arrived row (R, D)."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_RW: Tensor, arrival: Arrival, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(y_ND, weights_RW, arrival.position_RW, arrival.copy_row_N)
        return ops.combine_rows(y_ND, arrival.position_RW, arrival.row_slot_RW, weights_RW, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, weights_RW, position_RW, copy_row_N = ctx.saved_tensors
        # One place more than there are copies takes what the unused columns hold.
        place_RW = torch.where(position_RW >= 0, position_RW, len(y_ND)).long()
        weight_N = weights_RW.new_empty(len(y_ND) + 1).scatter_(0, place_RW.reshape(-1), weights_RW.reshape(-1))
        grad_y_ND = ops.gather_rows(grads[0], copy_row_N, weight_N[:-1])
        return grad_y_ND, ops.combine_rows_weight_grad(grads[0], y_ND, position_RW), None, None


class _Home(torch.autograd.Function):
    """Rows (R, D) where the experts live -> sums (T, D) at home; weights (T, C) only if no one applied them yet."""

    @staticmethod
    def forward(ctx: Any, z_RD: Tensor, weights_TC: Tensor | None, plan: Plan, link: Link) -> Tensor:
        ctx.plan, ctx.link = plan, link
        z_SD = link.exchange(z_RD, plan.recv_rows, plan.send_rows, "combine")
        ctx.save_for_backward(*([] if weights_TC is None else [z_SD, weights_TC]))
        sizes = plan.site.cut.group_sizes_of_ranks if weights_TC is None else [plan.top_k]
        return ops.combine_rows(z_SD, plan.visit_row_TC, leaf_of_visit(plan), weights_TC, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        plan, link, grad_TD = ctx.plan, ctx.link, grads[0].contiguous()
        grad_weights_TC = weight_S = None
        if ctx.saved_tensors:
            z_SD, weights_TC = ctx.saved_tensors
            grad_weights_TC = ops.combine_rows_weight_grad(grad_TD, z_SD, plan.visit_row_TC)
            rows = plan.visit_row_TC.reshape(-1).long()
            weight_S = weights_TC.new_empty(len(rows)).scatter_(0, rows, weights_TC.reshape(-1))
        grad_SD = ops.gather_rows(grad_TD, plan.row_token_S, weight_S)
        grad_RD = link.exchange(grad_SD, plan.send_rows, plan.recv_rows, "combine_backward")
        return grad_RD, grad_weights_TC, None, None
