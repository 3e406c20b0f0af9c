"""Dispatch: carry each row to the ranks that hold its experts, then group the rows by expert.

    tokens -> router -> plan -> [dispatch] -> experts -> combine

A row travels once to each rank, with the slots it is for and its weights; rows for the own rank do not touch the
transport. Backward is the transpose: gradients of rows and weights travel back, and a token sums what its rows bring
along the placement's tree.

Shape letters as in ops.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.plan import Plan
from ep_engine.transport import Link


@dataclass(frozen=True)
class Arrival:
    """What this rank works on, and how it finds its way back."""

    x_ND: Tensor  # rows grouped by local slot
    rows_per_slot: list[int]  # [L], on the host
    weights_RW: Tensor | None  # (R, W) float32 combine weights of the arrived rows; None: they stayed at home
    row_slot_RW: Tensor  # (R, W) int32 slots of the arrived rows, ascending, -1: none
    position_RW: Tensor  # (R, W) int32 place of each copy in x_ND
    copy_row_N: Tensor  # (N,) int32 arrived row of each place


def dispatch(x_TD: Tensor, weights_TK: Tensor, plan: Plan, link: Link) -> Arrival:
    """Send each token's row to its ranks and group what arrives by expert.

    Args:
        x_TD: float32 or bfloat16, the tokens of this rank.
        weights_TK: float32 combine weights.
        plan: from `make_plan` on the ids of the same tokens.
        link: this layer's end of the transport.
    """
    rows_RD, weights_RW, row_slot_RW = _Send.apply(x_TD, weights_TK, plan, link)  # type: ignore[no-untyped-call]
    tables = ops.plan_arrival(
        row_slot_RW, plan.rows_from_rank_P, own_rank=plan.site.rank, num_slots=plan.site.slots_per_rank
    )
    rows_per_slot = tables.rows_per_slot_L.tolist()
    copy_row_N = tables.copy_row_N[: sum(rows_per_slot)]
    x_ND = _Expand.apply(  # type: ignore[no-untyped-call]
        rows_RD, copy_row_N, tables.position_RW, row_slot_RW, plan.site.cut.group_sizes_of_slots
    )
    weighted = None if plan.site.one_row_per_copy else weights_RW
    return Arrival(x_ND, rows_per_slot, weighted, row_slot_RW, tables.position_RW, copy_row_N)


class _Send(torch.autograd.Function):
    """x (T, D), weights (T, K) at home -> rows (R, D), weights (R, W), slots (R, W) where the experts live."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, plan: Plan, link: Link) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.link = plan, link
        rows_SD = ops.gather_rows(x_TD, plan.row_token_S)
        width = plan.row_slot_SW.shape[1]
        if plan.site.one_row_per_copy:
            words = plan.row_slot_SW  # the weights stay at home
        else:
            weights_SW = weights_TK.reshape(-1)[_choice_of_row(plan).clamp(max=weights_TK.numel() - 1)]
            words = torch.cat((plan.row_slot_SW, weights_SW.view(torch.int32)), dim=1)
        words_R = link.exchange(words, plan.send_rows, plan.recv_rows, "dispatch")
        rows_RD = link.exchange(rows_SD, plan.send_rows, plan.recv_rows, "dispatch")
        slots_RW = words_R[:, :width].contiguous()
        weights_RW = words_R[:, width:].contiguous().view(torch.float32)
        ctx.mark_non_differentiable(slots_RW)
        return rows_RD, weights_RW, slots_RW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        plan, link, (grad_RD, grad_RW, _) = ctx.plan, ctx.link, grads
        grad_SD = link.exchange(grad_RD.contiguous(), plan.recv_rows, plan.send_rows, "dispatch_backward")
        sizes = [plan.top_k] if plan.site.one_row_per_copy else plan.site.cut.group_sizes_of_ranks
        grad_x_TD = ops.combine_rows(grad_SD, plan.visit_row_TC, leaf_of_visit(plan), None, sizes)
        if plan.site.one_row_per_copy:
            return grad_x_TD, None, None, None
        grad_SW = link.exchange(grad_RW.contiguous(), plan.recv_rows, plan.send_rows, "dispatch_backward")
        # One place more than there are weights takes what the unused columns hold.
        grad_weights = grad_SW.new_zeros(plan.num_tokens * plan.top_k + 1)
        grad_weights.scatter_(0, _choice_of_row(plan).reshape(-1), grad_SW.reshape(-1))
        return grad_x_TD, grad_weights[:-1].view(plan.num_tokens, plan.top_k), None, None


class _Expand(torch.autograd.Function):
    """Arrived rows (R, D) -> a row for each of their copies (N, D), grouped by slot."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, copy_row_N: Tensor, position_RW: Tensor, row_slot_RW: Tensor, sizes: list[int]
    ) -> Tensor:
        ctx.save_for_backward(position_RW, row_slot_RW)
        ctx.sizes = sizes
        return ops.gather_rows(rows_RD, copy_row_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        position_RW, row_slot_RW = ctx.saved_tensors
        grad_RD = ops.combine_rows(grads[0], position_RW, row_slot_RW, None, ctx.sizes)
        return grad_RD, None, None, None, None


def _choice_of_row(plan: Plan) -> Tensor:
    """(S, W) int64: which of all T * K choices each column of a row is; T * K where it is none."""
    choice_SW = plan.row_choice_SW.long()
    flat_SW = plan.row_token_S.long().unsqueeze(1) * plan.top_k + choice_SW
    return torch.where(choice_SW >= 0, flat_SW, plan.num_tokens * plan.top_k)


def leaf_of_visit(plan: Plan) -> Tensor:
    """Leaves for the sum at home: ranks, or columns where each copy travels by itself."""
    if not plan.site.one_row_per_copy:
        return plan.visit_rank_TC
    columns = torch.arange(plan.top_k, dtype=torch.int32, device=plan.visit_row_TC.device)
    return columns.expand_as(plan.visit_row_TC).contiguous()
