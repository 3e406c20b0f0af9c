"""The stopwatch: where the time of one step goes.

While none runs, a timed function is called straight on. While one runs, every begin and end leaves a mark (the time on
CPU, an event of the stream on a GPU), and what lies between two marks belongs to the innermost part that was open then.

Waiting for other ranks cannot be seen from one rank. All ranks of a group end an exchange together, so the shortest
time that any of them spent in it is what moving takes, and what others spent more is waiting. The same holds for what
is in no part: ranks of a stage do the same there, dense products and sums of gradients, on as many tokens each.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

PARTS = ("dispatch", "experts", "combine", "attention", "optimiser", "waiting", "other")
EXCHANGE = "exchange"  # inside dispatch and combine: moving, and waiting

P = ParamSpec("P")
T = TypeVar("T")

_running: "Stopwatch | None" = None  # one step of one process at a time


class Stopwatch:
    """The marks of one step on one rank."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, bool, float | torch.cuda.Event]] = []

    def mark(self, part: str, begins: bool) -> None:
        """A part begins or ends here."""
        if not self._on_gpu:
            self._marks.append((part, begins, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, begins, event))

    def seconds(self) -> tuple[dict[str, float], list[tuple[str, float]]]:
        """Of every part without those inside it; and of every exchange, in order, with the part that it is in."""
        if self._on_gpu:
            torch.cuda.synchronize()
        own: defaultdict[str, float] = defaultdict(float)
        exchanges: list[tuple[str, float]] = []
        open_parts: list[str] = []
        for (part, begins, at), (_, _, until) in pairwise(self._marks):
            if begins:
                open_parts.append(part)
            elif part in open_parts:
                while open_parts.pop() != part:
                    pass
            innermost = open_parts[-1] if open_parts else "other"
            if innermost != EXCHANGE:
                own[innermost] += _between(at, until)
            else:
                exchanges.append((next(p for p in reversed(open_parts) if p != EXCHANGE), _between(at, until)))
        return own, exchanges


def _between(at: float | torch.cuda.Event, until: float | torch.cuda.Event) -> float:
    if isinstance(at, torch.cuda.Event) and isinstance(until, torch.cuda.Event):
        return float(at.elapsed_time(until)) / 1000
    assert isinstance(at, float), "all marks are of one clock"
    assert isinstance(until, float), "all marks are of one clock"
    return until - at


@contextmanager
def running(device: torch.device) -> Iterator[Stopwatch]:
    """Time the block, which is a step."""
    global _running
    _running = watch = Stopwatch(device)
    try:
        with part("other"):
            yield watch
    finally:
        _running = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """The block is a part of the step."""
    watch = _running
    if watch is None:
        yield
        return
    watch.mark(name, begins=True)
    try:
        yield
    finally:
        watch.mark(name, begins=False)


def timed(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make every call of a function a part of the step."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if _running is None:
                return function(*args, **kwargs)
            with part(name):
                return function(*args, **kwargs)

        return call

    return wrap


def time_backward(name: str, x: Tensor, y: Tensor) -> None:
    """Make the backward from y to x a part of the step."""
    watch = _running
    if watch is not None and x.requires_grad and y.requires_grad:
        y.register_hook(lambda _: watch.mark(name, begins=True))
        x.register_hook(lambda _: watch.mark(name, begins=False))


def split(
    watch: Stopwatch,
    device: torch.device,
    dispatch: dist.ProcessGroup,
    stage: dist.ProcessGroup,
    world: dist.ProcessGroup,
) -> dict[str, float]:
    """Seconds of every one of PARTS, as means over all ranks; they add up to the step. All ranks call this.

    Args:
        watch: of this rank's step.
        device: of tensors that the groups exchange.
        dispatch: ranks that exchange rows.
        stage: ranks with the same layers.
        world: all ranks.
    """
    own, exchanges = watch.seconds()
    here = torch.tensor([own["other"], *(seconds for _, seconds in exchanges)], dtype=torch.float64, device=device)
    least = here.clone()
    dist.all_reduce(least[:1], dist.ReduceOp.MIN, group=stage)
    dist.all_reduce(least[1:], dist.ReduceOp.MIN, group=dispatch)
    own["other"] = float(least[0])
    own["waiting"] += float((here - least).sum())
    for (inside, _), moving in zip(exchanges, least[1:].tolist(), strict=True):
        own[inside] += moving
    total = torch.tensor([own[name] for name in PARTS], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=world)
    return dict(zip(PARTS, (total / dist.get_world_size(world)).tolist(), strict=True))
