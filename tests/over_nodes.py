"""What every rank of two nodes does for tests/test_nodes.py; the first one writes what was found as JSON to argv[1]."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ep_engine.ledger import Ledger
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.transports.connect import connect
from tests.moe_cases import D, make_layer, shuffled_placement

CPU = torch.device("cpu")


def eth0_sent() -> int:
    """Bytes that this node has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("eth0:"))


def seconds_of_transfer(num_bytes: int, *, both_ways: bool) -> float:
    """From the first rank to the first of the other node, until it has arrived there."""
    rank, other = dist.get_rank(), dist.get_world_size() // 2
    message, place = torch.zeros(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    peer = {0: other, other: 0}.get(rank)
    dist.barrier()
    started = time.perf_counter()
    work = []
    if peer is not None and (both_ways or rank == 0):
        work.append(dist.isend(message, peer))
    if peer is not None and (both_ways or rank == other):
        work.append(dist.irecv(place, peer))
    for part in work:
        part.wait()
    dist.barrier()
    return time.perf_counter() - started


def exchange(meshes: Meshes) -> list[tuple[int, int]]:
    """(bytes in the ledger under `network`, bytes that eth0 sent) of every rank for a MoE layer and its backward."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ledger = Ledger(meshes.ep_tiers())
    links = connect("auto", meshes, CPU, shuffled_placement(8, size).cut(size)).links(ledger, 0)
    layer = make_layer(8, 2, size, links=links, rank=rank)
    x_TD = torch.randn(8000, D, requires_grad=True)
    dist.barrier()
    before = eth0_sent()
    dist.barrier()
    y_TD, _ = layer(x_TD)
    y_TD.sum().backward()
    dist.barrier()
    sent = eth0_sent() - before
    counted = sum(num_bytes for (_, _, tier), num_bytes in ledger.sent.items() if tier == "network")
    found: list[tuple[int, int]] = [(0, 0)] * size
    dist.all_gather_object(found, (counted, sent))
    return found


if __name__ == "__main__":
    world = World.from_environment()
    with process_groups(world, CPU, world.size, 60.0) as meshes:
        found = {
            "nodes": meshes.node_of_rank,
            "one_way_s": seconds_of_transfer(4_000_000, both_ways=False),
            "both_ways_s": seconds_of_transfer(4_000_000, both_ways=True),
            "exchange": exchange(meshes),
        }
        if world.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))
        dist.barrier()
