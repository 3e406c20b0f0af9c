"""The experts' matrix products on CPU: threads over experts, one thread and no padding for each.

So the bits of an expert's output depend on its rows alone, not on how many other experts share the rank. Rows and
weights get their gradients expert by expert, while an expert's rows are in the caches (csrc/expert_products.h).

Shape letters as in experts.py.
"""

from torch import Tensor

from ep_engine import ops
from ep_engine.grouped_experts import WeightGrads
from ep_engine.ops import ExpertsBackward

forward, gate_up = ops.experts_forward, ops.experts_gate_up


def backward(given: ExpertsBackward, *, later: bool) -> tuple[Tensor, Tensor, WeightGrads]:
    """Gradients of the copies (N, D) and of their weights (N,), and what gives those of the experts' weights."""
    if later:
        grad_x_ND, inside = ops.experts_rows_backward(given)
        return grad_x_ND, inside.weight_N, lambda: ops.experts_weight_grads(given, inside)
    grad_x_ND, grad_weight_N, weight_grads = ops.experts_backward(given)
    return grad_x_ND, grad_weight_N, lambda: weight_grads
