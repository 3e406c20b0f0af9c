"""The transport between ranks: rows arrive in order, and a dead peer is a fault that names who, where and what."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.transport import Collective, Link
from tests.distributed import run_ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_arrive_in_rank_order_with_the_own_rows_last(world_size: int) -> None:
    run_ranks(_check_order, world_size=world_size)


def _check_order(rank: int, world_size: int) -> None:
    transport = Collective(dist.group.WORLD)
    send_rows = [(rank + to) % 3 for to in range(world_size)]
    order = [to for to in range(world_size) if to != rank] + [rank]
    rows = torch.tensor([[rank, to, i] for to in order for i in range(send_rows[to])], dtype=torch.int32).view(-1, 3)

    recv_P = transport.exchange_counts(torch.tensor(send_rows, dtype=torch.int32), "counts")
    assert recv_P.tolist() == [(source + rank) % 3 for source in range(world_size)]
    received = transport.exchange(rows, send_rows, recv_P.tolist(), "rows")
    sources = [source for source in range(world_size) if source != rank] + [rank]
    assert received.tolist() == [[source, rank, i] for source in sources for i in range(recv_P[source])]


def test_a_dead_peer_is_a_fault_that_names_rank_layer_and_direction() -> None:
    run_ranks(_lose_a_peer)


def _lose_a_peer(rank: int, world_size: int) -> None:
    link = Link(Collective(dist.group.WORLD), Ledger(["self", "node"]), 7)
    rows = torch.ones(2, 4)
    link.exchange(rows, [1, 1], [1, 1], "dispatch")
    if rank == 1:
        os._exit(0)  # without a word, and so that only what the other does counts
    with pytest.raises(Fault, match=r"rank 0 of 2 in group ep: combine of layer 7 did not finish .*; a peer died"):
        link.exchange(rows, [1, 1], [1, 1], "combine")


def test_a_silent_peer_is_a_fault_within_the_time_out() -> None:
    run_ranks(_wait_for_a_silent_peer, timeout_s=60)


def _wait_for_a_silent_peer(rank: int, world_size: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    link = Link(Collective(group), Ledger(["self", "node"]), 3)
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(Fault, match=r"dispatch of layer 3 did not finish .*a peer died or hangs"):
            link.exchange(torch.ones(2, 4), [1, 1], [1, 1], "dispatch")
        assert time.monotonic() - started < 20
    else:
        time.sleep(6)
    dist.barrier()  # the other group still works
