"""The shared-memory transport: memory that comes back, faults that name the peer, and nothing left behind."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.errors import Fault
from ep_engine.transports.regions import Regions
from ep_engine.transports.shared_memory import SharedMemory
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build the sanitized program with")
def test_thread_sanitizer_finds_no_race_between_ranks(tmp_path: Path) -> None:
    program = tmp_path / "ranks"
    sources = [ROOT / "tests" / "native" / "shared_memory_threads.cpp", ROOT / "csrc" / "cpu" / "shared_memory.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    # Address randomisation off: some kernels place libraries where this sanitizer keeps its books.
    line = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    if "personality" in done.stderr:  # not allowed here; then as it is
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every byte arrived\n"


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3 << 14)), max_size=40))
def test_regions_do_not_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    regions, held = Regions(1 << 16, 1 << 20), []
    for take, size in steps:
        if take:
            first = regions.take(size)
            if first is not None and size:
                assert 1 << 16 <= first <= (1 << 20) - size
                assert all(first + size <= other or other + length <= first for other, length in held)
                held.append((first, size))
        elif held:
            regions.give_back(held.pop(size % len(held))[0])
    for first, _ in held:
        regions.give_back(first)
    whole = (1 << 20) - (1 << 16)
    assert regions.take(whole) == 1 << 16
    assert regions.take(1) is None


@pytest.mark.parametrize("moment", ["before", "between open and close"])
def test_a_killed_rank_is_a_fault_on_all_others_and_leaves_nothing_behind(moment: str) -> None:
    before = set(os.listdir("/dev/shm"))
    started = time.monotonic()
    run_ranks(_lose_one_of_four, moment, world_size=4, timeout_s=60, dying=frozenset({2}))
    assert time.monotonic() - started < 30  # long before the time-out of the transport
    assert set(os.listdir("/dev/shm")) <= before


def _lose_one_of_four(rank: int, world_size: int, moment: str) -> None:
    transport = SharedMemory(dist.group.WORLD, timeout_s=600.0)
    rows = [2] * world_size
    transport.begin(rows, rows, 64, CPU, "dispatch of layer 0").finish()
    if rank == 2:
        if moment != "before":
            transport.begin(rows, rows, 64, CPU, "dispatch of layer 1")
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(Fault) as caught:
        transport.begin(rows, rows, 64, CPU, "dispatch of layer 1").finish()
    words = rf"rank {rank} of 4 in group ep: dispatch of layer 1 did not finish, rank \d (died|failed)"
    assert re.match(words, str(caught.value)), caught.value


def test_a_silent_rank_is_a_fault_within_the_time_out() -> None:
    run_ranks(_wait_for_a_silent_rank, timeout_s=60)


def _wait_for_a_silent_rank(rank: int, world_size: int) -> None:
    transport = SharedMemory(dist.group.WORLD, timeout_s=1.0)
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(Fault, match=r"counts of layer 3 did not finish, rank 1 did not come within the time-out"):
            transport.exchange_counts(torch.ones(2, 1, dtype=torch.int32), "counts of layer 3")
        assert time.monotonic() - started < 10
    dist.barrier()


def test_counts_that_disagree_are_a_fault_and_nothing_is_written() -> None:
    run_ranks(_disagree, timeout_s=60)


def _disagree(rank: int, world_size: int) -> None:
    transport = SharedMemory(dist.group.WORLD, timeout_s=20.0)
    send, recv = ([0, 3], [0, 1]) if rank == 0 else ([2, 0], [2, 0])  # rank 1 expects 2, rank 0 would send 3
    words = "expects another number of bytes|failed"
    with pytest.raises(Fault, match=f"dispatch of layer 2 did not finish, rank {1 - rank} ({words})"):
        transport.begin(send, recv, 64, CPU, "dispatch of layer 2").finish()


def test_an_arena_that_is_too_small_is_a_fault_on_all_ranks() -> None:
    run_ranks(_ask_for_too_much, timeout_s=60)


def _ask_for_too_much(rank: int, world_size: int) -> None:
    transport = SharedMemory(dist.group.WORLD, timeout_s=20.0, capacity=1 << 20)
    send, recv = ([0, 0], [0, 40000]) if rank == 0 else ([40000, 0], [0, 0])
    words = "needs 2560000 bytes, the shared arena has no room" if rank == 0 else "rank 0 failed"
    with pytest.raises(Fault, match=words):
        transport.begin(send, recv, 64, CPU, "dispatch of layer 0")


def test_memory_is_used_again_while_tensors_stay_whole() -> None:
    run_ranks(_use_again, world_size=3)


def _use_again(rank: int, world_size: int) -> None:
    transport = SharedMemory(dist.group.WORLD, timeout_s=20.0, capacity=1 << 20)  # for a tenth of what is sent
    rows, kept = [100] * world_size, []
    for turn in range(60):
        exchange = transport.begin(rows, rows, 64, CPU, "rows")
        for _, out in exchange.parts:
            out.fill_(turn)
        received = exchange.finish()
        if turn % 20 == 0:
            kept.append((turn, received))
    for turn, received in kept:
        assert (received == turn).all()
