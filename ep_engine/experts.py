"""Experts: each local expert's SwiGLU on its own rows, and each row's weighted sum, arXiv:2002.05202 eq. 6.

    tokens -> router -> plan -> dispatch -> [experts] -> combine

On CPU an expert's matrix products are unpadded and run in one thread each, and threads run over experts: so the bits of
an expert's output depend on its rows alone, not on how many other experts share the rank.

Gradients of the rows and gradients of the weights are nodes of their own, so that a schedule can take the second later
without computing the first again. Kept for them are the arrived rows and, per copy, gate and up: an expert's input is
gathered again, its output is not needed (csrc/swiglu.h).

Shape letters:  R rows arrived   N copies grouped by slot   L slots of this rank   D model dim   F expert hidden dim
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ep_engine import ops
from ep_engine.dispatch import Arrival


class Experts(nn.Module):
    """The experts of this rank, stacked by slot: w_gate (L, F, D), w_up (L, F, D), w_down (L, D, F).

    Args:
        num_slots: L.
        hidden_size: D.
        expert_hidden_size: F.
        sum_sizes: group sizes, in slots, of the part of the placement's tree that is summed here.
    """

    def __init__(self, num_slots: int, hidden_size: int, expert_hidden_size: int, sum_sizes: list[int]) -> None:
        super().__init__()
        up = (num_slots, expert_hidden_size, hidden_size)
        self.w_gate = nn.Parameter(torch.empty(up))
        self.w_up = nn.Parameter(torch.empty(up))
        self.w_down = nn.Parameter(torch.empty(num_slots, hidden_size, expert_hidden_size))
        self.sum_sizes = sum_sizes

    def forward(self, rows_RD: Tensor, arrival: Arrival) -> Tensor:
        """Arrived rows -> for each the weighted sum of the outputs of its experts, (R, D). Idle slots cost nothing.

        The rows of `arrival` are an argument of their own for FSDP, which looks for gradients among the arguments.
        """
        weights = (self.w_gate, self.w_up, self.w_down)
        handover = _Handover(arrival, self.sum_sizes)
        ticket = _WeightGrads.apply(*weights, handover)  # type: ignore[no-untyped-call]
        rows_RD = _Join.apply(rows_RD, ticket)  # type: ignore[no-untyped-call]
        z_RD: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
            rows_RD, arrival.weights_RW, *(w.detach() for w in weights), handover
        )
        return z_RD


@dataclass
class _Handover:
    """What the backward of the rows leaves for that of the weights."""

    arrival: Arrival
    sum_sizes: list[int]
    rows_RD: Tensor | None = None
    grad_RD: Tensor | None = None
    grads: ops.SwigluGrads | None = None

    def copy_rows(self, rows: slice) -> Tensor:
        """Arrived row of each copy of an expert."""
        return self.arrival.tables.copy_row_N[rows]


class _WeightGrads(torch.autograd.Function):
    """Nothing forward; backward the gradients of the weights. Its output is a ticket that ties them to the rows."""

    @staticmethod
    def forward(ctx: Any, w_gate: Tensor, w_up: Tensor, w_down: Tensor, handover: _Handover) -> Tensor:
        ctx.handover = handover
        ctx.like = w_gate.shape, w_down.shape
        return w_gate.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        kept = ctx.handover
        assert kept.grads is not None, "the backward of the rows runs first"
        assert kept.rows_RD is not None, "the backward of the rows runs first"
        assert kept.grad_RD is not None, "the backward of the rows runs first"
        x_RD, grad_RD, through = kept.rows_RD, kept.grad_RD, kept.grads
        kept.rows_RD = kept.grad_RD = kept.grads = None
        up_shape, down_shape = ctx.like
        grad_w_gate, grad_w_up, grad_w_down = (x_RD.new_empty(shape) for shape in (up_shape, up_shape, down_shape))
        for slot, num_rows in enumerate(kept.arrival.rows_per_slot):
            if num_rows == 0:
                for grad in (grad_w_gate, grad_w_up, grad_w_down):
                    grad[slot].zero_()

        def run(slot: int, rows: slice) -> None:
            x = _gathered("x", x_RD, kept.copy_rows(rows))
            grad = _gathered("grad", grad_RD, kept.copy_rows(rows))
            torch.mm(grad.t(), through.hidden_NF[rows], out=grad_w_down[slot])
            torch.mm(through.gate_NF[rows].t(), x, out=grad_w_gate[slot])
            torch.mm(through.up_NF[rows].t(), x, out=grad_w_up[slot])

        _over_experts(run, kept.arrival.rows_per_slot, x_RD.device)
        return grad_w_gate, grad_w_up, grad_w_down, None


class _Join(torch.autograd.Function):
    """The rows, unchanged; their gradient also sets off that of the weights."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, ticket: Tensor) -> Tensor:
        return rows_RD.view_as(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_zeros(())


class _Mixture(torch.autograd.Function):
    """z[r] = sum over the row's copies of weight * w_down (silu(g) * u), g = w_gate x, u = w_up x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_RW: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        handover: _Handover,
    ) -> Tensor:
        tables, rows_per_slot = handover.arrival.tables, handover.arrival.rows_per_slot
        num_copies, hidden = sum(rows_per_slot), w_gate.shape[1]
        gate_NF, up_NF = x_RD.new_empty(num_copies, hidden), x_RD.new_empty(num_copies, hidden)
        y_ND = x_RD.new_empty(num_copies, x_RD.shape[1])

        def run(slot: int, rows: slice) -> None:
            x = _gathered("x", x_RD, handover.copy_rows(rows))
            torch.mm(x, w_gate[slot].t(), out=gate_NF[rows])
            torch.mm(x, w_up[slot].t(), out=up_NF[rows])
            hidden = ops.swiglu(gate_NF[rows], up_NF[rows], _scratch("hidden", gate_NF[rows].shape, gate_NF))
            torch.mm(hidden, w_down[slot].t(), out=y_ND[rows])

        _over_experts(run, rows_per_slot, x_RD.device)
        ctx.save_for_backward(x_RD, weights_RW, gate_NF, up_NF, w_gate, w_up, w_down)
        ctx.handover = handover
        slots_RW = handover.arrival.row_slot_RW
        return ops.combine_rows(y_ND, tables.position_RW, slots_RW, weights_RW, handover.sum_sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_RD, weights_RW, gate_NF, up_NF, w_gate, w_up, w_down = ctx.saved_tensors
        kept, grad_RD = ctx.handover, grads[0]
        position_RW = kept.arrival.tables.position_RW
        weight_N = ops.choice_weights_backward(weights_RW, position_RW, len(gate_NF), 1).view(-1)
        grad_gate_NF, grad_up_NF, hidden_NF = (torch.empty_like(gate_NF) for _ in range(3))
        through = ops.SwigluGrads(grad_gate_NF, grad_up_NF, hidden_NF, torch.empty_like(weight_N))
        grad_x_ND = gate_NF.new_empty(len(gate_NF), x_RD.shape[1])

        def run(slot: int, rows: slice) -> None:
            grad = _gathered("grad", grad_RD, kept.copy_rows(rows))
            part = ops.SwigluGrads(*(whole[rows] for whole in through))
            grad_hidden = torch.mm(grad, w_down[slot], out=_scratch("hidden", part.gate_NF.shape, gate_NF))
            ops.swiglu_backward(grad_hidden, gate_NF[rows], up_NF[rows], weight_N[rows], part)
            torch.mm(part.gate_NF, w_gate[slot], out=grad_x_ND[rows])
            grad_x_ND[rows].addmm_(part.up_NF, w_up[slot])

        _over_experts(run, kept.arrival.rows_per_slot, x_RD.device)
        kept.rows_RD, kept.grad_RD, kept.grads = x_RD, grad_RD, through
        grad_x_RD = ops.combine_rows(grad_x_ND, position_RW, kept.arrival.row_slot_RW, None, kept.sum_sizes)
        grad_weights_RW = torch.empty_like(weights_RW)
        ops.choice_weights(through.weight_N, position_RW, grad_weights_RW)
        return grad_x_RD, grad_weights_RW, None, None, None, None


def _gathered(name: str, x_RD: Tensor, copy_row_N: Tensor) -> Tensor:
    """The rows of one expert, in the scratch memory of this thread."""
    out = _scratch(name, torch.Size((len(copy_row_N), x_RD.shape[1])), x_RD)
    return ops.gather_rows(x_RD, copy_row_N, out=out)


_of_thread = threading.local()


def _scratch(name: str, shape: torch.Size, like: Tensor) -> Tensor:
    """Memory for one expert's rows that a thread uses again for the next: new memory costs more than filling it."""
    kept = _of_thread.__dict__.setdefault("kept", {})
    key = name, like.dtype, like.device
    if key not in kept or kept[key].numel() < shape.numel():
        kept[key] = like.new_empty(shape.numel())
    whole: Tensor = kept[key]
    return whole[: shape.numel()].view(shape)


def _over_experts(run: Callable[[int, slice], None], rows_per_slot: list[int], device: torch.device) -> None:
    """Call `run(slot, rows)` for each slot that has rows, on CPU side by side with one thread each."""
    ends = list(accumulate(rows_per_slot))
    work = [(slot, slice(end - n, end)) for slot, (n, end) in enumerate(zip(rows_per_slot, ends, strict=True)) if n]
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for slot, rows in work:
            run(slot, rows)
        return
    # The largest first, so that the last thread does not start on a large one. Autograd is off in these threads.
    largest_first = sorted(work, key=lambda item: item[1].start - item[1].stop)
    for done in [_one_thread_each(threads).submit(_without_grad, run, *item) for item in largest_first]:
        done.result()


def _without_grad(run: Callable[[int, slice], None], slot: int, rows: slice) -> None:
    with torch.no_grad():
        run(slot, rows)


@cache
def _one_thread_each(threads: int) -> ThreadPoolExecutor:
    """Worker threads in which a torch op stays in its thread."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="expert", initializer=start)
    for _ in range(threads):
        pool.submit(lambda: None)
    started.wait()
    torch.set_num_threads(threads)  # the number is kept per thread, but new threads take the one set last
    return pool
