"""Experts: each local expert's SwiGLU on its own rows, and each row's weighted sum, arXiv:2002.05202 eq. 6.

    tokens -> router -> plan -> dispatch -> [experts] -> combine

On CPU an expert's matrix products are unpadded and run in one thread each, and threads run over experts: so the bits of
an expert's output depend on its rows alone, not on how many other experts share the rank.

Gradients of the rows and gradients of the weights are nodes of their own, so that a schedule can take the second later
without computing the first again. Where none wants to, both are computed expert by expert, while its rows are in the
caches. Kept for them are the arrived rows and, per copy, gate and up: an expert's input is gathered again, its output
is not needed (csrc/swiglu.h).

Shape letters:  R rows arrived   N copies grouped by slot   L slots of this rank   D model dim   F expert hidden dim
"""

import threading
from collections.abc import Callable, Iterator
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

    def forward(self, rows_RD: Tensor, arrival: Arrival) -> Tensor:
        """Arrived rows -> for each the weighted sum of the outputs of its experts, (R, D). Idle slots cost nothing.

        The rows of `arrival` are an argument of their own for FSDP, which looks for gradients among the arguments.
        """
        handover = _Handover(arrival, self.sum_sizes, self.weight_grads_later)
        ticket = _WeightGrads.apply(self.w_gate_up, self.w_down, handover)  # type: ignore[no-untyped-call]
        rows_RD = _Join.apply(rows_RD, ticket)  # type: ignore[no-untyped-call]
        z_RD: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
            rows_RD, arrival.weights_RW, self.w_gate_up.detach(), self.w_down.detach(), handover
        )
        return z_RD


@dataclass
class _Handover:
    """What the backward of the rows leaves for that of the weights."""

    arrival: Arrival
    sum_sizes: list[int]
    later: bool
    weight_grads: tuple[Tensor, Tensor] | None = None
    compute: Callable[[int, slice], None] | None = None  # still to be called for each expert

    def copy_rows(self, rows: slice) -> Tensor:
        """Arrived row of each copy of an expert."""
        return self.arrival.tables.copy_row_N[rows]


class _WeightGrads(torch.autograd.Function):
    """Nothing forward; backward the gradients of the weights. Its output is a ticket that ties them to the rows."""

    @staticmethod
    def forward(ctx: Any, w_gate_up: Tensor, w_down: Tensor, handover: _Handover) -> Tensor:
        ctx.handover = handover
        return w_gate_up.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        kept = ctx.handover
        assert kept.weight_grads is not None, "the backward of the rows runs first"
        (grad_w_gate_up, grad_w_down), compute = kept.weight_grads, kept.compute
        kept.weight_grads = kept.compute = None
        if compute is not None:
            _over_experts(compute, kept.arrival.rows_per_slot, grad_w_down.device)
        return grad_w_gate_up, grad_w_down, None


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
        ctx: Any, x_RD: Tensor, weights_RW: Tensor, w_gate_up: Tensor, w_down: Tensor, handover: _Handover
    ) -> Tensor:
        tables, rows_per_slot = handover.arrival.tables, handover.arrival.rows_per_slot
        num_copies, width = sum(rows_per_slot), w_gate_up.shape[1]
        gate_up_NF = x_RD.new_empty(num_copies, width)
        y_ND = x_RD.new_empty(num_copies, x_RD.shape[1])

        def run(slot: int, rows: slice) -> None:
            x = _gathered("x", x_RD, handover.copy_rows(rows))
            gate_up = torch.mm(x, w_gate_up[slot].t(), out=gate_up_NF[rows])
            hidden = ops.swiglu(gate_up, _scratch("hidden", len(x), width // 2, x_RD))
            torch.mm(hidden, w_down[slot].t(), out=y_ND[rows])

        _over_experts(run, rows_per_slot, x_RD.device)
        ctx.save_for_backward(x_RD, weights_RW, gate_up_NF, w_gate_up, w_down)
        ctx.handover = handover
        slots_RW = handover.arrival.row_slot_RW
        return ops.combine_rows(y_ND, tables.position_RW, slots_RW, weights_RW, handover.sum_sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_RD, weights_RW, gate_up_NF, w_gate_up, w_down = ctx.saved_tensors
        kept, grad_RD = ctx.handover, grads[0]
        position_RW = kept.arrival.tables.position_RW
        num_copies, width = gate_up_NF.shape
        weight_N = ops.choice_weights_backward(weights_RW, position_RW, num_copies, 1).view(-1)
        grad_weight_N = torch.empty_like(weight_N)
        grad_x_ND = gate_up_NF.new_empty(num_copies, x_RD.shape[1])
        weight_grads = _weight_grads(w_gate_up, w_down, kept.arrival.rows_per_slot)
        inside: dict[int, ops.SwigluGrads] = {}

        def compute_weight_grads(slot: int, rows: slice, grad: Tensor, part: ops.SwigluGrads) -> None:
            x = _gathered("x", x_RD, kept.copy_rows(rows))
            torch.mm(grad.t(), part.hidden_NF, out=weight_grads[1][slot])
            torch.mm(part.gate_up_NF.t(), x, out=weight_grads[0][slot])

        def run(slot: int, rows: slice) -> None:
            grad = _gathered("grad", grad_RD, kept.copy_rows(rows))
            grad_hidden = torch.mm(grad, w_down[slot], out=_scratch("grad_hidden", len(grad), width // 2, x_RD))
            part = ops.SwigluGrads(*_inside(len(grad), width, x_RD, kept.later), grad_weight_N[rows])
            ops.swiglu_backward(grad_hidden, gate_up_NF[rows], weight_N[rows], part)
            torch.mm(part.gate_up_NF, w_gate_up[slot], out=grad_x_ND[rows])
            if kept.later:
                inside[slot] = part
            else:
                compute_weight_grads(slot, rows, grad, part)

        def run_later(slot: int, rows: slice) -> None:
            grad = _gathered("grad", grad_RD, kept.copy_rows(rows))
            compute_weight_grads(slot, rows, grad, inside.pop(slot))

        _over_experts(run, kept.arrival.rows_per_slot, x_RD.device)
        kept.weight_grads, kept.compute = weight_grads, run_later if kept.later else None
        grad_x_RD = ops.combine_rows(grad_x_ND, position_RW, kept.arrival.row_slot_RW, None, kept.sum_sizes)
        grad_weights_RW = torch.empty_like(weights_RW)
        ops.choice_weights(grad_weight_N, position_RW, grad_weights_RW)
        return grad_x_RD, grad_weights_RW, None, None, None


def _weight_grads(w_gate_up: Tensor, w_down: Tensor, rows_per_slot: list[int]) -> tuple[Tensor, Tensor]:
    """Room for the gradients of the weights, zero where an expert has no rows."""
    grads = torch.empty_like(w_gate_up), torch.empty_like(w_down)
    for slot, num_rows in enumerate(rows_per_slot):
        if num_rows == 0:
            for grad in grads:
                grad[slot].zero_()
    return grads


def _inside(num_rows: int, width: int, like: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Room for one expert's gradients of gate and up, and for its weighted hidden rows."""
    if keep:
        return like.new_empty(num_rows, width), like.new_empty(num_rows, width // 2)
    return _scratch("grad_gate_up", num_rows, width, like), _scratch("hidden", num_rows, width // 2, like)


def _gathered(name: str, x_RD: Tensor, copy_row_N: Tensor) -> Tensor:
    """The rows of one expert, in the scratch memory of this thread."""
    return ops.gather_rows(x_RD, copy_row_N, out=_scratch(name, len(copy_row_N), x_RD.shape[1], x_RD))


_of_thread = threading.local()


def _scratch(name: str, num_rows: int, width: int, like: Tensor) -> Tensor:
    """Memory for one expert's rows that a thread uses again for the next: new memory costs more than filling it."""
    kept = _of_thread.__dict__.setdefault("kept", {})
    key = name, like.dtype, like.device
    if key not in kept or kept[key].numel() < num_rows * width:
        kept[key] = like.new_empty(num_rows * width)
    whole: Tensor = kept[key]
    return whole[: num_rows * width].view(num_rows, width)


def _over_experts(run: Callable[[int, slice], None], rows_per_slot: list[int], device: torch.device) -> None:
    """Call `run(slot, rows)` for each slot that has rows, on CPU side by side with one thread each."""
    ends = list(accumulate(rows_per_slot))
    work = [(slot, slice(end - n, end)) for slot, (n, end) in enumerate(zip(rows_per_slot, ends, strict=True)) if n]
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for slot, rows in work:
            run(slot, rows)
        return
    # The largest first, so that the last thread does not start on a large one.
    largest_first = iter(sorted(work, key=lambda item: item[1].start - item[1].stop))
    pool = _one_thread_each(threads)
    for done in [pool.submit(_run_all, run, largest_first) for _ in range(threads)]:
        done.result()


def _run_all(run: Callable[[int, slice], None], work: Iterator[tuple[int, slice]]) -> None:
    """Take work until there is none; other threads take from the same iterator."""
    with torch.no_grad():  # which a thread has to say for itself
        for slot, rows in work:
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
