"""Experts: each local expert's SwiGLU on its own rows, arXiv:2002.05202 eq. 6.

    tokens -> router -> plan -> dispatch -> [experts] -> combine

On CPU an expert's matrix products are unpadded and run in one thread each, and threads run over experts: so the bits of
an expert's output depend on its rows alone, not on how many other experts share the rank.

Shape letters:  N rows grouped by slot   L slots of this rank   D model dim   F expert hidden dim
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """The experts of this rank, stacked by slot: w_gate (L, F, D), w_up (L, F, D), w_down (L, D, F)."""

    def __init__(self, num_slots: int, hidden_size: int, expert_hidden_size: int) -> None:
        super().__init__()
        up = (num_slots, expert_hidden_size, hidden_size)
        self.w_gate = nn.Parameter(torch.empty(up))
        self.w_up = nn.Parameter(torch.empty(up))
        self.w_down = nn.Parameter(torch.empty(num_slots, hidden_size, expert_hidden_size))

    def forward(self, x_ND: Tensor, rows_per_slot: list[int]) -> Tensor:
        """(N, D) rows grouped by slot -> (N, D). A slot without rows costs nothing."""
        y_ND: Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]
            x_ND, self.w_gate, self.w_up, self.w_down, rows_per_slot
        )
        return y_ND


class _GroupedSwiGLU(torch.autograd.Function):
    """y = w_down (silu(g) * u), g = w_gate x, u = w_up x, for each slot; keeps x, g and u, computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, rows_per_slot: list[int]
    ) -> Tensor:
        num_rows, hidden = x_ND.shape[0], w_gate.shape[1]
        gate_NF, up_NF = x_ND.new_empty(num_rows, hidden), x_ND.new_empty(num_rows, hidden)
        y_ND = torch.empty_like(x_ND)

        def run(slot: int, rows: slice) -> None:
            torch.mm(x_ND[rows], w_gate[slot].t(), out=gate_NF[rows])
            torch.mm(x_ND[rows], w_up[slot].t(), out=up_NF[rows])
            torch.mm(_swiglu(gate_NF[rows], up_NF[rows]), w_down[slot].t(), out=y_ND[rows])

        _over_experts(run, rows_per_slot, x_ND.device)
        ctx.save_for_backward(x_ND, gate_NF, up_NF, w_gate, w_up, w_down)
        ctx.rows_per_slot = rows_per_slot
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_ND, gate_NF, up_NF, w_gate, w_up, w_down = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        grad_x_ND = torch.empty_like(x_ND)
        grad_w_gate, grad_w_up, grad_w_down = (torch.zeros_like(w) for w in (w_gate, w_up, w_down))

        def run(slot: int, rows: slice) -> None:
            grad, x, gate, up = grad_ND[rows], x_ND[rows], gate_NF[rows], up_NF[rows]
            torch.mm(grad.t(), _swiglu(gate, up), out=grad_w_down[slot])
            grad_gate, grad_up = _swiglu_backward(grad @ w_down[slot], gate, up)
            torch.mm(grad_gate.t(), x, out=grad_w_gate[slot])
            torch.mm(grad_up.t(), x, out=grad_w_up[slot])
            torch.add(grad_gate @ w_gate[slot], grad_up @ w_up[slot], out=grad_x_ND[rows])

        _over_experts(run, ctx.rows_per_slot, x_ND.device)
        return grad_x_ND, grad_w_gate, grad_w_up, grad_w_down, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32, rounded once."""
    return (nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up; silu'(g) = s + g s (1 - s) with s = sigmoid(g)."""
    g, s = gate.float(), torch.sigmoid(gate.float())
    silu, d = g * s, grad.float()
    return (d * up.float() * (s + silu * (1 - s))).to(grad.dtype), (d * silu).to(grad.dtype)


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
