"""Run a test body on several local ranks (gloo, CPU, no ports)."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

# A server imports once what most ranks need and forks them, instead of the seconds of a fresh interpreter.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "checkpoint_tools.split",
        "checkpoint_tools.condense.layers",
        "ep_engine.training.trainer",
        "megatron.core.datasets.indexed_dataset",
        "torch.utils.tensorboard",
        "transformers.models.auto.tokenization_auto",
    ]
)


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message holds what it printed."""


def run_ranks(
    body: Callable[..., None],
    *args: object,
    world_size: int = 2,
    timeout_s: float = 120.0,
    dying: frozenset[int] = frozenset(),
) -> None:
    """Call `body(rank, world_size, *args)` on `world_size` processes; fail if any rank fails or hangs.

    Ranks meet through a temporary file rather than a TCP port, so tests can run side by side. `body` is a function
    of a module, because it is sent by name. What the ranks print is printed here when they are done. How the ranks in
    `dying` end is of no matter.

    Raises:
        RankFailed: with the output of the first rank that failed, or of all that were still running after `timeout_s`,
            with the place where each of their threads stood.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Pickled here and not by the start of the process, so that a body that cannot be loaded is a rank's failure.
        job = pickle.dumps((body, args))
        ranks = [
            _context.Process(target=_run_one, args=(rank, world_size, folder, dict(os.environ), job))
            for rank in range(world_size)
        ]
        for rank, process in enumerate(ranks):
            _log(folder, rank).touch()
            process.start()
        try:
            _watch(ranks, folder, timeout_s, dying)
        finally:
            for process in ranks:
                process.kill()
                process.join()
                process.close()
        for rank in range(world_size):
            sys.stdout.write(_log(folder, rank).read_text())


def _watch(ranks: list[BaseProcess], folder: Path, timeout_s: float, dying: frozenset[int]) -> None:
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(running, timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            raise RankFailed(_describe_hang(ranks, sorted(running.values()), folder, timeout_s))
        for sentinel in ended:
            del running[sentinel]
        if any(process.exitcode for rank, process in enumerate(ranks) if rank not in dying):
            raise RankFailed(_describe_failure(ranks, folder, dying))


def _describe_failure(ranks: list[BaseProcess], folder: Path, dying: frozenset[int]) -> str:
    """The rank that failed first: the others often fail after it, only because it is gone."""
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode and rank not in dying]
    first = min(failed, key=lambda rank: _log(folder, rank).stat().st_mtime_ns)
    code = ranks[first].exitcode
    how = f"died of {signal.Signals(-code).name}" if code < 0 else "failed"
    return f"rank {first} of {len(ranks)} {how}:\n{_log(folder, first).read_text()}"


def _describe_hang(ranks: list[BaseProcess], hung: list[int], folder: Path, timeout_s: float) -> str:
    for rank in hung:
        os.kill(ranks[rank].pid, signal.SIGUSR1)  # _run_one has faulthandler print the stacks
    time.sleep(0.5)
    stacks = "".join(f"\nrank {rank}:\n{_log(folder, rank).read_text()}" for rank in hung)
    return f"ranks {hung} of {len(ranks)} still ran after {timeout_s:g} s:{stacks}"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _run_one(rank: int, world_size: int, folder: Path, environment: dict[str, str], job: bytes) -> None:
    log = os.open(_log(folder, rank), os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)
    os.environ.clear()  # the server has the environment of the first test
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve
    torch.set_num_threads(1)
    try:
        body, args = pickle.loads(job)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        body(rank, world_size, *args)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: destroying the group could wait for the others
    sys.stdout.flush()
