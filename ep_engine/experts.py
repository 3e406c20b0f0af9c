"""Experts: each local expert's SwiGLU on its own rows, and each row's weighted sum, arXiv:2002.05202 eq. 6.

    tokens -> router -> plan -> dispatch -> [experts] -> combine

The matrix products are those of threaded_experts.py on CPU, of grouped_experts.py on GPUs.

Gradients of the rows and gradients of the weights are nodes of their own (weight_grads.py). Kept for them are the
arrived rows and, per copy, gate and up: an expert's input is gathered again, its output is not needed (csrc/swiglu.h).
What is kept beside the tensors that autograd knows of is integers, so that recomputation can drop the rest.

Shape letters:  R rows arrived   N copies grouped by slot   L slots of this rank   D model dim   F expert hidden dim
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ep_engine import grouped_experts, ops, threaded_experts
from ep_engine.dispatch import Arrival
from ep_engine.ops import ExpertsBackward
from ep_engine.stopwatch import timed
from ep_engine.weight_grads import Handover, tie


class Experts(nn.Module):
    """The experts of this rank, stacked by slot: w_gate_up (L, 2F, D), gate first, and w_down (L, D, F).

    Args:
        num_slots: L.
        hidden_size: D.
        expert_hidden_size: F.
        sum_sizes: group sizes, in slots, of the part of the placement's tree that is summed here.
    """

    def __init__(self, num_slots: int, hidden_size: int, expert_hidden_size: int, sum_sizes: list[int]) -> None:
        super().__init__()
        # One matrix product for gate and up: twice as wide, so faster.
        self.w_gate_up = nn.Parameter(torch.empty(num_slots, 2 * expert_hidden_size, hidden_size))
        self.w_down = nn.Parameter(torch.empty(num_slots, hidden_size, expert_hidden_size))
        self.sum_sizes = sum_sizes
        self.weight_grads_later = False  # compute them when their node runs, not with those of the rows
        self.grouped: bool | None = None  # all experts in one product; None: on GPUs
        self.recompute = False  # gate and up are not kept but computed again

    @timed("experts")
    def forward(self, rows_RD: Tensor, weights_RW: Tensor, arrival: Arrival) -> Tensor:
        """Arrived rows -> for each the weighted sum of the outputs of its experts, (R, D). Idle slots cost nothing."""
        grouped = rows_RD.is_cuda if self.grouped is None else self.grouped
        handover = _Kept(
            arrival=arrival,
            sum_sizes=self.sum_sizes,
            trained=self.w_gate_up.requires_grad or self.w_down.requires_grad,
            later=self.weight_grads_later,
            recompute=self.recompute,
            grouped=grouped,
        )
        rows_RD = tie(rows_RD, handover, self.w_gate_up, self.w_down)
        z_RD: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
            rows_RD, weights_RW, self.w_gate_up.detach(), self.w_down.detach(), handover
        )
        return z_RD


@dataclass(kw_only=True)
class _Kept(Handover):
    """What the backward needs beside tensors."""

    arrival: Arrival
    sum_sizes: list[int]
    trained: bool
    later: bool
    recompute: bool
    grouped: bool


class _Mixture(torch.autograd.Function):
    """z[r] = sum over the row's copies of weight * w_down (silu(g) * u), g = w_gate x, u = w_up x."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_RW: Tensor, w_gate_up: Tensor, w_down: Tensor, handover: _Kept
    ) -> Tensor:
        arrival, products = handover.arrival, grouped_experts if handover.grouped else threaded_experts
        gate_up_NF, y_ND = products.forward(x_RD, arrival.tables, w_gate_up, w_down)
        ctx.save_for_backward(x_RD, weights_RW, None if handover.recompute else gate_up_NF, w_gate_up, w_down)
        ctx.handover, ctx.products = handover, products
        position_RW, slots_RW = arrival.tables.position_RW, arrival.row_slot_RW
        return ops.combine_rows(y_ND, position_RW, slots_RW, weights_RW, handover.sum_sizes)

    @staticmethod
    @timed("experts")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_RD, weights_RW, gate_up_NF, w_gate_up, w_down = ctx.saved_tensors
        kept = ctx.handover
        if gate_up_NF is None:
            gate_up_NF = ctx.products.gate_up(x_RD, kept.arrival.tables, w_gate_up, w_down)
        position_RW = kept.arrival.tables.position_RW
        weight_N = ops.choice_weights_backward(weights_RW, position_RW, len(gate_up_NF), 1).view(-1)
        grad_x_ND, grad_weight_N, weight_grads = ctx.products.backward(
            ExpertsBackward(grads[0], x_RD, kept.arrival.tables, w_gate_up, w_down, gate_up_NF, weight_N),
            later=kept.later or not kept.trained,
        )
        if kept.trained:  # nobody asks for those of frozen experts, which are then never computed
            kept.weight_grads = timed("experts")(weight_grads)
        grad_x_RD = ops.combine_rows(grad_x_ND, position_RW, kept.arrival.row_slot_RW, None, kept.sum_sizes)
        grad_weights_RW = torch.empty_like(weights_RW)
        ops.choice_weights(grad_weight_N, position_RW, grad_weights_RW)
        return grad_x_RD, grad_weights_RW, None, None, None
