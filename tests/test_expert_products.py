"""The experts' products as one op: the bits of one product after the other, whatever the threads, and nothing more."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_engine import ops

D, F = 20, 12
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=9)
DTYPES = [torch.float32, torch.bfloat16]


def problem(counts: list[int], dtype: torch.dtype, seed: int = 0) -> ops.ExpertsBackward:
    """Arrived rows that are parts of longer ones, and copies of any of them for every slot."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    num_copies, num_rows = sum(counts), 30
    rows = torch.randint(0, num_rows, (num_copies + 5,), generator=generator).int()
    tables = ops.ArrivalTables(torch.tensor(counts).int(), torch.empty(0), rows)
    weight_N = torch.rand(num_copies, generator=generator)
    w_gate_up, w_down = draw(len(counts), 2 * F, D), draw(len(counts), D, F)
    x_RD, grad_RD = draw(num_rows, D + 3)[:, 1 : D + 1], draw(num_rows, D + 6)[:, 2 : D + 2]
    return ops.ExpertsBackward(grad_RD, x_RD, tables, w_gate_up, w_down, draw(num_copies, 2 * F), weight_N)


def one_after_the_other(given: ops.ExpertsBackward) -> dict[str, list[Tensor]]:
    """Every expert by itself, on one thread."""
    grad_RD, x_RD, tables, w_gate_up, w_down, _, weight_N = given
    ends = [0, *accumulate(tables.rows_per_slot_L.tolist())]
    found: dict[str, list[Tensor]] = {name: [] for name in ("gate_up", "y", "grad_x", "grad_weight", "w1", "w2")}
    for slot, (first, end) in enumerate(pairwise(ends)):
        rows = tables.copy_row_N[first:end].long()
        x, grad = x_RD[rows], grad_RD[rows]
        gate_up = x @ w_gate_up[slot].t()
        hidden = ops.swiglu(gate_up, gate_up.new_empty(len(x), F))
        inside = ops.SwigluGrads(torch.empty_like(gate_up), torch.empty_like(hidden), torch.empty(len(x)))
        ops.swiglu_backward(grad @ w_down[slot], gate_up, weight_N[first:end].contiguous(), inside)
        values = (gate_up, hidden @ w_down[slot].t(), inside.gate_up_NF @ w_gate_up[slot], inside.weight_N)
        for name, value in zip(found, (*values, inside.gate_up_NF.t() @ x, grad.t() @ inside.hidden_NF), strict=True):
            found[name].append(value)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@given(counts=COUNTS, seed=st.integers(0, 99))
def test_products_are_those_of_one_expert_after_the_other(dtype: torch.dtype, counts: list[int], seed: int) -> None:
    case, threads = problem(counts, dtype, seed), torch.get_num_threads()
    torch.set_num_threads(1)
    expected = one_after_the_other(case)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gate_up_NF, y_ND = ops.experts_forward(case.x_RD, case.tables, case.w_gate_up, case.w_down)
            case = case._replace(gate_up_NF=gate_up_NF)
            grad_x_ND, grad_weight_N, grads = ops.experts_backward(case)
            grad_x_later, inside = ops.experts_rows_backward(case)
            grads_later = ops.experts_weight_grads(case, inside)
            for name, value in (
                ("gate_up", gate_up_NF), ("y", y_ND), ("grad_x", grad_x_ND), ("grad_weight", grad_weight_N),
                ("grad_x", grad_x_later), ("grad_weight", inside.weight_N),
            ):  # fmt: skip
                assert torch.equal(value, torch.cat(expected[name])), (count, name)
            for name, both in (("w1", (grads[0], grads_later[0])), ("w2", (grads[1], grads_later[1]))):
                assert all(torch.equal(grad, torch.stack(expected[name])) for grad in both), (count, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"w_down": torch.zeros(2, D, F + 1)}, r"w_gate_up must be contiguous, in the dtype of x, and \(2, 26, 20\)"),
        ({"w_gate_up": torch.zeros(2, D, 2 * F).mT}, r"w_gate_up must be contiguous"),
        ({"w_gate_up": torch.zeros(2, 2 * F, D).bfloat16()}, r"w_gate_up must be contiguous, in the dtype of x"),
        ({"gate_up_NF": torch.zeros(6, 2 * F)}, r"copies_of_slot must sum to the 6 rows of the matrices"),
        ({"grad_RD": torch.zeros(29, D)}, r"grad must have 30 rows, got 29"),
        ({"weight_N": torch.zeros(5).double()}, r"weight"),
        ({"x_RD": torch.zeros(30, D).half()}, r"dtype of x|float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    case = problem([2, 3], torch.float32)
    ops.experts_backward(case)
    with pytest.raises(RuntimeError, match=sentence):
        ops.experts_backward(case._replace(**change))


def test_the_ops_are_described_to_the_compiler() -> None:
    case = problem([2, 3], torch.float32)
    grad_RD, x_RD, tables, w_gate_up, w_down, gate_up_NF, weight_N = case
    copies = (tables.copy_row_N, tables.rows_per_slot_L)
    out_ND, out_N = torch.empty(5, D), torch.empty(5)
    inside, grads = (torch.empty(5, 2 * F), torch.empty(5, F)), (torch.empty_like(w_gate_up), torch.empty_like(w_down))
    weights = (w_gate_up, w_down)
    calls = {
        "experts_forward": (x_RD, *copies, *weights, gate_up_NF, out_ND),
        "experts_backward": (
            grad_RD, x_RD, *copies, *weights, gate_up_NF, weight_N, out_ND, out_N, None, None, *grads
        ),
        "experts_weight_grads": (grad_RD, x_RD, *copies, *inside, *grads),
    }  # fmt: skip
    for name, arguments in calls.items():
        op = getattr(torch.ops.ep_engine, name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
