"""Ranks of one machine for benchmarks: start them, and time calls that all of them make together."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Together:
    """A call that every rank makes, or the first rank alone while the others wait."""

    call: Callable[[], object]
    alone: bool = False
    threads: int = 1


def on_ranks(
    body: Callable[..., dict[str, Any]], *args: object, world_size: int, start_method: str = "spawn"
) -> dict[str, Any]:
    """Call `body(rank, *args)` on gloo ranks in processes of their own; what the first rank returns.

    Args:
        body: a function of a module, because it is sent by name.
        args: what else it is given.
        world_size: number of ranks.
        start_method: of multiprocessing; `forkserver` spares ranks their imports, seconds for each.
    """
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(["ep_engine.training.trainer"])  # has no effect once the server runs
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    context = mp.get_context(start_method)
    with tempfile.TemporaryDirectory() as folder:
        answers = context.SimpleQueue()
        mp.start_processes(_run, (world_size, folder, body, args, answers), world_size, start_method=start_method)
        found: dict[str, Any] = answers.get()
    return found


def _run(rank: int, world_size: int, folder: str, body: Any, args: tuple[object, ...], answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found = body(rank, *args)
    dist.barrier()
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def time_together(calls: dict[str, Together], *, rounds: int, warm_up: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, the calls taking turns: median, least and largest, each that of the slowest rank."""
    return {name: summary(times) for name, times in all_times(calls, rounds=rounds, warm_up=warm_up).items()}


def all_times(calls: dict[str, Together], *, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """The same, every round by itself."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, together in calls.items():
            milliseconds = _time(together)
            if turn >= warm_up:
                found[name].append(milliseconds)
    return found


def summary(times: list[float]) -> dict[str, float]:
    """Median, least and largest of milliseconds."""
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _time(together: Together) -> float:
    torch.set_num_threads(together.threads)
    dist.barrier()
    started = time.perf_counter()
    if not together.alone or dist.get_rank() == 0:
        together.call()
    slowest = torch.tensor((time.perf_counter() - started) * 1e3, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()
