"""Dispatch: carry each token's row to the ranks that hold its experts.

    tokens -> router -> plan -> [dispatch] -> experts -> combine

A row travels once to each rank, the slots it is for and its weights behind it in one message; rows for the own rank do
not touch the transport. Backward is the transpose: gradients of rows and weights travel back, and a token sums what its
rows bring along the placement's tree.

Shape letters as in ops.py.
"""

from typing import Any

import torch
from torch import Tensor

from ep_engine import debug, ops
from ep_engine.message import Message
from ep_engine.plan import Hop, Plan, make_plan
from ep_engine.stopwatch import timed


class Arrival:
    """What has arrived, in integers, and how it finds its way back.

    Not a dataclass: FSDP goes through those among a module's arguments.

    Attributes:
        row_slot_RW: int32, local slots each row is for, ascending, -1: none.
        tables: the same grouped by slot.
        plans: of every hop.
    """

    def __init__(self, row_slot_RW: Tensor, plans: tuple[Plan, ...]) -> None:
        self.row_slot_RW, self.plans = row_slot_RW, plans
        hop = plans[-1].hop
        _, run_order = hop.tables(row_slot_RW.device)
        self.tables = ops.plan_arrival(row_slot_RW, plans[-1].rows_of_run, run_order, num_slots=hop.slots_per_rank)


@timed("dispatch")
def dispatch(
    x_TD: Tensor, weights_TK: Tensor, plan: Plan, way: tuple[Hop, ...], *, fp8: bool = False
) -> tuple[Tensor, Tensor, Arrival]:
    """Send each token's row to its ranks and find out which rows each expert gets.

    Args:
        x_TD: float32 or bfloat16, the tokens of this rank.
        weights_TK: float32 combine weights.
        plan: of the first hop, from `make_plan` on the ids of the same tokens.
        way: the hops.
        fp8: rows travel as e4m3 with a scale per 128 elements (csrc/fp8_rows.h); gradients do not.

    Returns:
        Rows (R, D), their combine weights (R, W) float32, and what they are for.
    """
    rows_RD, weights_RW, *rest = _Dispatch.apply(x_TD, weights_TK, plan, way, fp8)  # type: ignore[no-untyped-call]
    return rows_RD, weights_RW, Arrival(*rest)


class _Dispatch(torch.autograd.Function):
    """x (T, D), weights (T, K) at home -> rows (R, D), weights (R, W), slots (R, W) where the experts live."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, plan: Plan, way: tuple[Hop, ...], fp8: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Plan, ...]]:
        plans: list[Plan] = []
        rows = _quantised(x_TD) if fp8 else x_TD
        weights, slots = weights_TK, plan.row_slot_SW
        for hop in way:
            if plans:
                runs = torch.arange(len(plans[-1].rows_of_run), device=slots.device)
                run_of_row = runs.repeat_interleave(plans[-1].rows_of_run.long())
                plan = make_plan(slots.long(), hop, run_of_row, len(runs))
            plans.append(plan)
            rows, weights, slots = _carry_out(rows, weights, plan)
        ctx.plans = tuple(plans)
        ctx.mark_non_differentiable(slots)
        return _dequantised(rows, x_TD) if fp8 else rows, weights, slots, ctx.plans

    @staticmethod
    @timed("dispatch")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_rows, grad_weights = grads[0], grads[1]
        for plan in reversed(ctx.plans):
            grad_rows, grad_weights = _carry_gradients_home(grad_rows, grad_weights, plan)
        return grad_rows, grad_weights, None, None, None


def _carry_out(x_TD: Tensor, weights_TK: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """One hop: rows (R, D), weights (R, W), slots (R, W) of what arrives."""
    width = plan.row_slot_SW.shape[1]
    message = Message(x_TD.shape[1], x_TD.dtype, num_words=2 * width)
    if stays_here(plan):  # every row is its token's
        plan.hop.link.record(plan.send_rows, message.num_bytes, "dispatch")
        weights_SW = weights_TK.new_empty(plan.row_slot_SW.shape)
        ops.choice_weights(weights_TK, plan.row_choice_SW, weights_SW)
        return x_TD, weights_SW, plan.row_slot_SW
    exchange = plan.hop.link.begin(plan.send_rows, plan.recv_rows, message.num_bytes, x_TD.device, "dispatch")
    for part, out in exchange.parts:
        ops.gather_rows(x_TD, plan.row_token_S[part], out=message.rows(out), streaming=exchange.streaming)
        message.words(out, torch.int32, 0, width).copy_(plan.row_slot_SW[part])
        ops.choice_weights(weights_TK, plan.row_choice_SW[part], message.words(out, torch.float32, width, width))
    received = plan.hop.link.finish(exchange)
    slots_RW = message.words(received, torch.int32, 0, width).contiguous()
    if debug.wanted():
        link = plan.hop.link
        where = f"layer {link.layer} on rank {link.transport.rank}"
        debug.check_slots(slots_RW, plan.hop.slots_per_rank, where, may_be_empty=plan.hop.fixed_rows is not None)
    return message.rows(received), message.words(received, torch.float32, width, width).contiguous(), slots_RW


def _carry_gradients_home(grad_RD: Tensor, grad_RW: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """One hop back: the tokens' gradients (T, D), and those of their weights (T, K)."""
    width = plan.row_slot_SW.shape[1]
    message = Message(grad_RD.shape[1], grad_RD.dtype, num_words=width)
    if stays_here(plan):
        plan.hop.link.record(plan.recv_rows, message.num_bytes, "dispatch_backward")
        return grad_RD, ops.choice_weights_backward(
            grad_RW.contiguous(), plan.row_choice_SW, plan.num_tokens, plan.top_k
        )
    link = plan.hop.link
    exchange = link.begin(plan.recv_rows, plan.send_rows, message.num_bytes, grad_RD.device, "dispatch_backward")
    everything = torch.arange(len(grad_RD), dtype=torch.int32, device=grad_RD.device)
    for part, out in exchange.parts:
        ops.gather_rows(grad_RD, everything[part], out=message.rows(out), streaming=exchange.streaming)
        message.words(out, torch.float32, 0, width).copy_(grad_RW[part])
    received = link.finish(exchange)
    grad_TD = sum_at_home(message.rows(received), plan)
    grad_SW = message.words(received, torch.float32, 0, width)
    return grad_TD, ops.choice_weights_backward(grad_SW, plan.row_choice_SW, plan.num_tokens, plan.top_k)


def stays_here(plan: Plan) -> bool:
    """Whether the hop is none: one rank, and one row for each token, which is the token's."""
    return len(plan.send_rows) == 1 and not plan.hop.one_row_per_copy


def sum_at_home(rows_SD: Tensor, plan: Plan) -> Tensor:
    """What a token's rows bring, summed along the tree, (T, D)."""
    if plan.hop.one_row_per_copy:
        columns = torch.arange(plan.top_k, dtype=torch.int32, device=rows_SD.device)
        leaf_TC = columns.expand_as(plan.visit_row_TC).contiguous()
        return ops.combine_rows(rows_SD, plan.visit_row_TC, leaf_TC, None, [plan.top_k])
    return ops.combine_rows(rows_SD, plan.visit_row_TC, plan.visit_rank_TC, None, plan.hop.sum_sizes)


def _quantised(x_TD: Tensor) -> Tensor:
    """Rows of x as e4m3 with their scales behind, as float32 words that are moved and not looked into."""
    message = quantised_row(x_TD.shape[1])
    out = torch.empty(len(x_TD), message.num_bytes, dtype=torch.uint8, device=x_TD.device)
    everything = torch.arange(len(x_TD), dtype=torch.int32, device=x_TD.device)
    scales = message.words(out, torch.float32, 0, message.num_words)
    ops.quantise_rows(x_TD, everything, message.rows(out), scales)
    return out.view(torch.float32)


def _dequantised(rows: Tensor, like: Tensor) -> Tensor:
    message = quantised_row(like.shape[1])
    rows_RB = rows.contiguous().view(torch.uint8)
    scales = message.words(rows_RB, torch.float32, 0, message.num_words)
    return ops.dequantise_rows(message.rows(rows_RB), scales, like.dtype)


def quantised_row(dim: int) -> Message:
    """A row of `dim` elements in 8 bits, with its scales."""
    return Message(dim, torch.uint8, num_words=-(-dim // ops.FP8_BLOCK))
