"""Which transport a group gets, and the sentence for one that its ranks do not allow."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_engine.errors import UserError
from ep_engine.mesh import World, process_groups
from ep_engine.placement import Placement
from ep_engine.transports.connect import connect
from tests.distributed import run_ranks
from tests.run_files import make_files, resolve_run

CPU = torch.device("cpu")
# Node of every rank, factors of the placement, whether one hop is wanted, and the transports of the hops.
CHOICES = {
    "one node": ([0, 0, 0, 0], (2, 2), False, ["SharedMemory"], "shared_memory (one node)"),
    "two nodes": ([0, 0, 1, 1], (2, 2), False, ["Collective", "SharedMemory"], "hierarchical (several nodes)"),
    "one hop over two nodes": ([0, 0, 1, 1], (2, 2), True, ["Collective"], "collective (ranks of several nodes"),
    "a tree that has no nodes": ([0, 0, 1, 1], (4,), False, ["Collective"], "collective (ranks of several nodes"),
    "nodes of unequal size": ([0, 0, 0, 1], (2, 2), False, ["Collective"], "collective (ranks of several nodes"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_takes_what_the_ranks_allow_and_says_so_once(name: str) -> None:
    run_ranks(_choose, name, world_size=4)


def _choose(rank: int, world_size: int, name: str) -> None:
    nodes, factors, one_hop, expected, sentence = CHOICES[name]
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ep_engine.transports.connect").addHandler(handler)
    cut = Placement(devices=4, factors=factors, layers=[[0, 1, 2, 3]]).cut(4)
    world = World(rank=rank, size=world_size, local_rank=rank, local_size=world_size, node=nodes[rank])
    with process_groups(world, CPU, 4, 60.0) as meshes:
        connection = connect("auto", meshes, CPU, cut, one_hop=one_hop)
    assert [type(transport).__name__ for transport, _ in connection.hops] == expected
    assert len(heard) == (1 if rank == 0 else 0)
    assert all(f"transport of the experts: {sentence}" in words for words in heard)


def test_a_rank_without_peers_moves_nothing() -> None:
    cut = Placement(devices=1, factors=(), layers=[[0, 1]]).cut(1)
    with process_groups(World(), CPU, 1, 60.0) as meshes:
        connection = connect("auto", meshes, CPU, cut)
    assert [(type(transport).__name__, tiers) for transport, tiers in connection.hops] == [("Alone", ["self"])]
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("transport", "device", "others", "ranks_per_node", "sentence"),
    [
        ("shared_memory", "cuda", (), 4, r"^moe\.transport is shared_memory, which is not for parallel\.device cuda;"),
        ("cuda_ipc", "cpu", (), 4, r"^moe\.transport is cuda_ipc, which is not for parallel\.device cpu; .* to cuda$"),
        (
            "cuda_ipc",
            "auto",
            (),
            4,
            r"^moe\.transport is cuda_ipc, which is not for parallel\.device auto; .* to cuda$",
        ),
        ("shared_memory", "cpu", (), 2, r"the 4 ranks of an expert-parallel group do not lie on one node of 2 ranks;"),
        ("hierarchical", "cpu", (), 4, r"expert_parallel_size \(4\) is no multiple of the 4 ranks of a node that is"),
        (
            "hierarchical",
            "cpu",
            ("moe.fixed_rows=9",),
            2,
            r"moe\.fixed_rows is 9, but what a node passes on is not fix",
        ),
    ],
)
def test_a_transport_that_the_ranks_do_not_allow_is_refused(
    transport: str,
    device: str,
    others: tuple[str, ...],
    ranks_per_node: int,
    sentence: str,
    files: Path,
    tmp_path: Path,
) -> None:
    given = (f"moe.transport={transport}", f"parallel.device={device}", "parallel.expert_parallel_size=4", *others)
    with pytest.raises(UserError, match=sentence):
        resolve_run(files, tmp_path, *given, world_size=4, ranks_per_node=ranks_per_node)
