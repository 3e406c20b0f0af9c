"""The experts' matrix products on CPU: unpadded, one thread for each expert, threads over experts.

So the bits of an expert's output depend on its rows alone, not on how many other experts share the rank. Rows and
weights get their gradients expert by expert, while an expert's rows are in the caches.

Shape letters as in experts.py.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.dispatch import Arrival
from ep_engine.grouped_experts import Backward, WeightGrads


def forward(x_RD: Tensor, w_gate_up: Tensor, w_down: Tensor, arrival: Arrival) -> tuple[Tensor, Tensor]:
    """Gate and up (N, 2F) and output (N, D) of every copy."""
    rows_per_slot, width = arrival.rows_per_slot, w_gate_up.shape[1]
    gate_up_NF = x_RD.new_empty(sum(rows_per_slot), width)
    y_ND = x_RD.new_empty(len(gate_up_NF), x_RD.shape[1])

    def run(slot: int, rows: slice) -> None:
        x = _gathered("x", x_RD, arrival.tables.copy_row_N[rows])
        gate_up = torch.mm(x, w_gate_up[slot].t(), out=gate_up_NF[rows])
        hidden = ops.swiglu(gate_up, _scratch("hidden", len(x), width // 2, x_RD))
        torch.mm(hidden, w_down[slot].t(), out=y_ND[rows])

    _over_experts(run, rows_per_slot)
    return gate_up_NF, y_ND


def backward(given: Backward, w_gate_up: Tensor, w_down: Tensor, *, later: bool) -> tuple[Tensor, Tensor, WeightGrads]:
    """Gradients of the copies (N, D) and of their weights (N,), and what gives those of the experts' weights."""
    grad_RD, x_RD, gate_up_NF, weight_N, arrival = given
    rows_per_slot, copy_row_N = arrival.rows_per_slot, arrival.tables.copy_row_N
    width = gate_up_NF.shape[1]
    grad_weight_N = torch.empty_like(weight_N)
    grad_x_ND = gate_up_NF.new_empty(len(gate_up_NF), x_RD.shape[1])
    weight_grads = _weight_grads(w_gate_up, w_down, rows_per_slot)
    inside: dict[int, ops.SwigluGrads] = {}

    def compute_weight_grads(slot: int, rows: slice, grad: Tensor, part: ops.SwigluGrads) -> None:
        x = _gathered("x", x_RD, copy_row_N[rows])
        torch.mm(grad.t(), part.hidden_NF, out=weight_grads[1][slot])
        torch.mm(part.gate_up_NF.t(), x, out=weight_grads[0][slot])

    def run(slot: int, rows: slice) -> None:
        grad = _gathered("grad", grad_RD, copy_row_N[rows])
        grad_hidden = torch.mm(grad, w_down[slot], out=_scratch("grad_hidden", len(grad), width // 2, x_RD))
        part = ops.SwigluGrads(*_inside(len(grad), width, x_RD, later), grad_weight_N[rows])
        ops.swiglu_backward(grad_hidden, gate_up_NF[rows], weight_N[rows], part)
        torch.mm(part.gate_up_NF, w_gate_up[slot], out=grad_x_ND[rows])
        if later:
            inside[slot] = part
        else:
            compute_weight_grads(slot, rows, grad, part)

    def run_later(slot: int, rows: slice) -> None:
        grad = _gathered("grad", grad_RD, copy_row_N[rows])
        compute_weight_grads(slot, rows, grad, inside.pop(slot))

    def finish() -> tuple[Tensor, Tensor]:
        if later:
            _over_experts(run_later, rows_per_slot)
        return weight_grads

    _over_experts(run, rows_per_slot)
    return grad_x_ND, grad_weight_N, finish


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


def _over_experts(run: Callable[[int, slice], None], rows_per_slot: list[int]) -> None:
    """Call `run(slot, rows)` for each slot that has rows, side by side with one thread each."""
    ends = list(accumulate(rows_per_slot))
    work = [(slot, slice(end - n, end)) for slot, (n, end) in enumerate(zip(rows_per_slot, ends, strict=True)) if n]
    threads = torch.get_num_threads()
    if threads == 1:
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
