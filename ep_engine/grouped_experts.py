"""The experts' matrix products on a GPU: one grouped product for all experts, its groups known to the device alone.

Nothing here waits for the device: buffers have room for every copy there may be, and what lies behind the last group is
neither computed nor read.

Shape letters as in experts.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_engine import ops
from ep_engine.ops import ArrivalTables, ExpertsBackward

WeightGrads = Callable[[], tuple[Tensor, Tensor]]
"""Gives the gradients of w_gate_up and w_down, once."""


def forward(x_RD: Tensor, tables: ArrivalTables, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up (N, 2F) and output (N, D) of every copy."""
    gate_up_NF = gate_up(x_RD, tables, w_gate_up, w_down)
    hidden_NF = ops.swiglu(gate_up_NF, gate_up_NF.new_empty(len(gate_up_NF), w_down.shape[2]))
    return gate_up_NF, F.grouped_mm(hidden_NF, w_down.transpose(1, 2), offs=_ends(tables))


def gate_up(x_RD: Tensor, tables: ArrivalTables, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The first result of `forward` alone."""
    x_ND = ops.gather_rows(x_RD, tables.copy_row_N)
    return F.grouped_mm(x_ND, w_gate_up.transpose(1, 2), offs=_ends(tables))


def backward(given: ExpertsBackward, *, later: bool) -> tuple[Tensor, Tensor, WeightGrads]:
    """Gradients of the copies (N, D) and of their weights (N,), and what gives those of the experts' weights."""
    grad_RD, x_RD, tables, w_gate_up, w_down, gate_up_NF, weight_N = given
    ends_L, copy_row_N = _ends(tables), tables.copy_row_N
    grad_ND = ops.gather_rows(grad_RD, copy_row_N)
    grad_hidden_NF = F.grouped_mm(grad_ND, w_down, offs=ends_L)
    inside = ops.SwigluGrads(torch.empty_like(gate_up_NF), torch.empty_like(grad_hidden_NF), torch.empty_like(weight_N))
    ops.swiglu_backward(grad_hidden_NF, gate_up_NF, weight_N, inside)
    grad_x_ND = F.grouped_mm(inside.gate_up_NF, w_gate_up, offs=ends_L)

    def compute() -> tuple[Tensor, Tensor]:
        x_ND = ops.gather_rows(x_RD, copy_row_N)
        return (
            F.grouped_mm(inside.gate_up_NF.t(), x_ND, offs=ends_L),
            F.grouped_mm(grad_ND.t(), inside.hidden_NF, offs=ends_L),
        )

    if later:
        return grad_x_ND, inside.weight_N, compute
    weight_grads = compute()
    return grad_x_ND, inside.weight_N, lambda: weight_grads


def _ends(tables: ArrivalTables) -> Tensor:
    return tables.rows_per_slot_L.cumsum(0, dtype=torch.int32)
