"""The transport between ranks: rows arrive in order, and a dead peer is a fault that names who, where and what."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.placement import Placement
from ep_engine.plan import Site, make_plan, way_to
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Collective, Link, Transport
from tests.distributed import run_ranks

TRANSPORTS = {
    "collective": lambda group, timeout_s: Collective(group),
    "collective, both ways": lambda group, timeout_s: Collective(
        group, dist.new_group(timeout=timedelta(seconds=timeout_s))
    ),
    "shared_memory": SharedMemory,
}


def exchanged(transport: Transport, rows: Tensor, send_rows: list[int], recv_rows: list[int], where: str) -> Tensor:
    """Rows of int32 sent and received."""
    exchange = transport.begin(send_rows, recv_rows, 4 * rows.shape[1], rows.device, where)
    for part, out in exchange.parts:
        out.copy_(rows[part].view(torch.uint8))
    return exchange.finish().view(torch.int32)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_rows_arrive_in_rank_order_with_the_own_rows_last(name: str, world_size: int) -> None:
    run_ranks(_check_order, name, world_size=world_size)


def _check_order(rank: int, world_size: int, name: str) -> None:
    transport = TRANSPORTS[name](dist.group.WORLD, 60.0)
    order = [to for to in range(world_size) if to != rank] + [rank]
    sources = [source for source in range(world_size) if source != rank] + [rank]
    kept = []
    for turn in range(4):
        send_rows = [(rank + to + turn) % 3 for to in range(world_size)]
        rows = [[rank, to, i, turn] for to in order for i in range(send_rows[to])]
        counts_PN = torch.tensor(send_rows, dtype=torch.int32)[:, None].repeat(1, 2)
        recv_PN = transport.exchange_counts(counts_PN, "counts")
        assert recv_PN.tolist() == [[(source + rank + turn) % 3] * 2 for source in range(world_size)]
        recv_rows = recv_PN[:, 0].tolist()
        given = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
        received = exchanged(transport, given, send_rows, recv_rows, "rows")
        kept.append((received, [[source, rank, i, turn] for source in sources for i in range(recv_rows[source])]))
        if turn == 2:
            del kept[1]  # room that is given back is used again, and what is still held stays
    for received, expected in kept:
        assert received.tolist() == expected


COLLECTIVES = ["collective", "collective, both ways"]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_dead_peer_is_a_fault_that_names_rank_layer_and_direction(name: str) -> None:
    run_ranks(_lose_a_peer, name)


def _lose_a_peer(rank: int, world_size: int, name: str) -> None:
    link = Link(TRANSPORTS[name](dist.group.WORLD, 60.0), Ledger(["self", "node"]), 7)
    device = torch.device("cpu")
    link.begin([1, 1], [1, 1], 16, device, "dispatch").finish()
    if rank == 1:
        os._exit(0)  # without a word, and so that only what the other does counts
    with pytest.raises(Fault, match=r"rank 0 of 2 in group ep: combine of layer 7 did not finish .*; a peer died"):
        link.begin([1, 1], [1, 1], 16, device, "combine").finish()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_silent_peer_is_a_fault_within_the_time_out(name: str) -> None:
    run_ranks(_wait_for_a_silent_peer, name, timeout_s=60)


def _wait_for_a_silent_peer(rank: int, world_size: int, name: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    link = Link(TRANSPORTS[name](group, 2.0), Ledger(["self", "node"]), 3)
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(Fault, match=r"dispatch of layer 3 did not finish .*a peer died or hangs"):
            link.begin([1, 1], [1, 1], 16, torch.device("cpu"), "dispatch").finish()
        assert time.monotonic() - started < 20
    else:
        time.sleep(6)
    dist.barrier()  # the other group still works


# Slots of the experts, and fixed rows, on either rank.
PLANS: dict[str, list[tuple[list[int], int | None]]] = {
    "placement": [([0, 1, 2, 3], None), ([1, 0, 2, 3], None)],
    "placement with fixed rows": [([0, 1, 2, 3], 5), ([1, 0, 2, 3], 5)],
    "fixed rows": [([0, 1, 2, 3], 5), ([0, 1, 2, 3], 6)],
}


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_ranks_that_plan_otherwise_are_a_fault(name: str, what: str) -> None:
    run_ranks(_plan_otherwise, name, what)


def _plan_otherwise(rank: int, world_size: int, name: str, what: str) -> None:
    link = Link(TRANSPORTS[name](dist.group.WORLD, 20.0), Ledger(["self", "node"]), 4)
    slots, fixed_rows = PLANS[what][rank]
    placement = Placement(devices=2, factors=(2,), layers=[slots])
    (hop,) = way_to(Site.of(placement, 0, 2, rank), [link], fixed_rows)
    with pytest.raises(Fault, match=f"rank {rank} of 2 in group ep: layer 4 is planned otherwise on rank {1 - rank}"):
        make_plan(torch.tensor([[0, 2]]), hop)
