"""The helper that other tests trust: ranks that fail, die or hang fail the test and say so."""

import ctypes
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, run_ranks


def test_ranks_meet_and_see_the_environment_of_the_test(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EP_TEST_VALUE", "7")
    run_ranks(_sum_ranks, 3, world_size=2)
    assert capfd.readouterr().out.splitlines() == ["rank 0 sees 7", "rank 1 sees 7"]


def _sum_ranks(rank: int, world_size: int, offset: int) -> None:
    x = torch.tensor([rank + offset])
    dist.all_reduce(x)
    assert x.item() == sum(range(world_size)) + world_size * offset
    assert torch.get_num_threads() == 1
    print(f"rank {rank} sees {os.environ['EP_TEST_VALUE']}")  # noqa: T201


def test_the_rank_that_failed_first_is_shown() -> None:
    with pytest.raises(RankFailed, match=r"(?s)^rank 1 of 2 failed.*ValueError: wrong on purpose"):
        run_ranks(_fail_on_rank_1)


def _fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("wrong on purpose")
    dist.barrier()  # fails too, because rank 1 is gone


def test_a_rank_that_dies_is_named_with_its_signal() -> None:
    with pytest.raises(RankFailed, match=r"(?s)^rank 0 of 2 died of SIGSEGV.*_crash_on_rank_0"):
        run_ranks(_crash_on_rank_0)


def _crash_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        ctypes.string_at(0)
    dist.barrier()


def test_ranks_that_hang_are_named_with_where_they_stand() -> None:
    with pytest.raises(RankFailed, match=r"(?s)^ranks \[1\] of 2 still ran after 3 s.*_sleep_on_rank_1"):
        run_ranks(_sleep_on_rank_1, timeout_s=3)


def _sleep_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)
