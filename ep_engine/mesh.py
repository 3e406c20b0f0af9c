"""Ranks and their grids: what torchrun says, and the two meshes over the same ranks.

    dense weights and the batch:  (pp, dp, tp)        experts:  (pp, edp, ep, etp),  edp * ep * etp = dp * tp

Ranks that follow each other are neighbours in tp, and in etp; those of a pipeline stage lie together. The only place
that makes process groups.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ep_engine import ops
from ep_engine.errors import UserError


@dataclass(frozen=True)
class World:
    """The ranks of this job, and which of them this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """What torchrun has set; one rank without it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "01010", strict=True)))

    def pick_device(self, wanted: str) -> torch.device:
        """`auto`: a GPU if every rank of the node has one of its own and the ops are built for it, else the CPU.

        Raises:
            UserError: `cuda` is wanted and there are fewer GPUs than ranks, or the ops are built for the CPU alone.
        """
        if wanted == "cuda" and torch.cuda.device_count() < self.local_size:
            raise UserError(
                f"parallel.device is cuda, but this machine has {torch.cuda.device_count()} GPUs for {self.local_size} "
                "ranks; start fewer ranks, or set it to cpu"
            )
        if wanted == "cuda" and not ops.built_for_cuda():
            raise UserError(
                "parallel.device is cuda, but csrc/ was built without it; build it where nvcc is on PATH, or set it to "
                "cpu"
            )
        if wanted == "cuda" or (
            wanted == "auto" and torch.cuda.device_count() >= self.local_size and ops.built_for_cuda()
        ):
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


@dataclass(frozen=True)
class Meshes:
    """The two grids over the ranks of a job."""

    dense: DeviceMesh  # ("pp", "dp", "tp")
    experts: DeviceMesh  # ("pp", "edp", "ep", "etp")
    dispatch: dist.ProcessGroup  # ep x etp: the ranks among which a token's experts lie
    stage: DeviceMesh  # ("stage",): the ranks with the same layers, for what each does on tokens of its own
    ends: dist.ProcessGroup | None  # the first and the last stage; None: this rank has neither, or both
    world: dist.ProcessGroup
    saving: dist.ProcessGroup  # every rank again, for the thread that writes checkpoints, over gloo
    node_of_rank: list[int]  # [world size]
    timeout_s: float  # a rank that hears nothing from another for so long fails
    ep_inside: dist.ProcessGroup | None  # the ranks of `dispatch` on this rank's node, and
    ep_across: dist.ProcessGroup | None  # its peers on the other nodes; None: one node, or nodes with unequal parts
    down: dict[str, dist.ProcessGroup]  # `dispatch` and `ep_across` again, where gloo joins nodes; see `Collective`

    def ep_tiers(self) -> list[str]:
        """Link tier from this rank to every rank that its tokens may go to: self, node or network."""
        own = dist.get_rank()
        ranks = dist.get_process_group_ranks(self.dispatch)
        node = self.node_of_rank
        return ["self" if r == own else "node" if node[r] == node[own] else "network" for r in ranks]


@contextmanager
def process_groups(
    world: World,
    device: torch.device,
    ep_size: int,
    timeout_s: float,
    *,
    tp_size: int = 1,
    etp_size: int = 1,
    pp_size: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Meshes]:
    """Join the other ranks, make the meshes, and leave at the end; a program that has joined already stays joined.

    Args:
        world: from torchrun; its size is a multiple of `pp_size * ep_size * etp_size` and of `pp_size * tp_size`.
        device: where this rank computes.
        ep_size: of the ranks or groups of `etp_size` ranks that share the experts; they have consecutive numbers.
        timeout_s: a rank that hears nothing from another for so long fails.
        tp_size: ranks that share one batch row and split its sequence; consecutive too.
        etp_size: ranks that split each expert; consecutive too.
        pp_size: groups of ranks that follow each other with other layers.
        settings: JSON values that all ranks must have in common, by name; compared before any group is made.

    Raises:
        UserError: on every rank, if one was started with other settings.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joined = dist.is_initialized()
    if joined:
        assert dist.get_world_size() == world.size, "the caller's group is the world"
    elif world.size == 1:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        dense, experts = grids(world.size, ep_size, tp_size=tp_size, etp_size=etp_size, pp_size=pp_size)
        nodes = _meet(world, settings or {})
        meshes = _make_meshes(world, device, dense, experts, nodes, timeout_s)
        # A program that has joined before chose a time-out of its own for the group of all.
        yield replace(meshes, world=dist.new_group(timeout=timeout, group_desc="world")) if joined else meshes
    finally:
        if not joined:
            dist.destroy_process_group()


def _meet(world: World, settings: Mapping[str, Any]) -> list[int]:
    """The node of every rank."""
    ranks: list[tuple[int, Mapping[str, Any]]] = [(0, {})] * world.size
    dist.all_gather_object(ranks, (world.node, settings))
    of_first = ranks[0][1]
    for rank, (_, of_rank) in enumerate(ranks):
        for name in (*of_first, *of_rank):
            ours, theirs = of_first.get(name), of_rank.get(name)
            if ours != theirs:
                raise UserError(
                    f"{name} is {ours} on rank 0 and {theirs} on rank {rank}; start all ranks with the same run file, "
                    "overrides and files"
                )
    return [node for node, _ in ranks]


def grids(
    world_size: int, ep_size: int, *, tp_size: int = 1, etp_size: int = 1, pp_size: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks in the two grids: (pp, dp, tp), and (pp, edp, ep, etp)."""
    ranks = torch.arange(world_size).view(pp_size, -1)
    return ranks.view(pp_size, -1, tp_size), ranks.view(pp_size, -1, ep_size, etp_size)


def rank_groups(dense: torch.Tensor, experts: torch.Tensor, node_of_rank: list[int]) -> dict[str, list[list[int]]]:
    """The ranks of every group, by axis, of the two grids: all that a job makes, or would make."""
    dispatch = experts.flatten(2).flatten(0, 1).tolist()
    return {
        "pp": _lines(dense, 0),
        "ends": [[line[0], line[-1]] for line in _lines(dense, 0) if len(line) > 1],
        "dp": _lines(dense, 1),
        "tp": _lines(dense, 2),
        "edp": _lines(experts, 1),
        "ep": _lines(experts, 2),
        "etp": _lines(experts, 3),
        "dispatch": dispatch,
        "stage": dense.flatten(1).tolist(),
        **_split_by_node(dispatch, node_of_rank),
    }


def _make_meshes(
    world: World,
    device: torch.device,
    dense: torch.Tensor,
    experts: torch.Tensor,
    nodes: list[int],
    timeout_s: float,
) -> Meshes:
    assert dist.group.WORLD is not None, "the process group was just made"
    # Not init_device_mesh: it gives its groups torch's half hour instead of our time-out.
    own: dict[str, dist.ProcessGroup] = {}
    down: dict[str, dist.ProcessGroup] = {}

    def make(axis: str, ranks: list[int], found: dict[str, dist.ProcessGroup]) -> None:
        name = f"{axis}_down" if found is down else axis
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), group_desc=name)
        if world.rank in ranks:
            found[axis] = group

    for axis, groups in rank_groups(dense, experts, nodes).items():
        for ranks in groups:  # every rank takes part in making every group
            make(axis, ranks, own)
            of_nodes = axis in ("dispatch", "ep_across") and len({nodes[rank] for rank in ranks}) > 1
            if of_nodes and device.type == "cpu":
                make(axis, ranks, down)

    saving = dist.new_group(timeout=timedelta(seconds=timeout_s), backend="gloo", group_desc="saving")

    def mesh(grid: torch.Tensor, *names: str) -> DeviceMesh:
        return DeviceMesh.from_group([own[name] for name in names], device.type, mesh=grid, mesh_dim_names=names)

    return Meshes(
        dense=mesh(dense, "pp", "dp", "tp"),
        experts=mesh(experts, "pp", "edp", "ep", "etp"),
        dispatch=own["dispatch"],
        stage=DeviceMesh.from_group(own["stage"], device.type, mesh_dim_names=("stage",)),
        ends=own.get("ends"),
        world=dist.group.WORLD,
        saving=saving,
        node_of_rank=nodes,
        timeout_s=timeout_s,
        ep_inside=own.get("ep_inside"),
        ep_across=own.get("ep_across"),
        down=down,
    )


def _lines(grid: torch.Tensor, dim: int) -> list[list[int]]:
    """The ranks of every line of a grid along a dim."""
    lines: list[list[int]] = grid.movedim(dim, -1).flatten(0, -2).tolist()
    return lines


def _split_by_node(groups: list[list[int]], node_of_rank: list[int]) -> dict[str, list[list[int]]]:
    """Groups of ranks on one node, and of ranks with the same place on each, if all nodes have the same number."""
    inside: list[list[int]] = []
    across: list[list[int]] = []
    for ranks in groups:
        nodes = sorted({node_of_rank[r] for r in ranks})
        parts = [[r for r in ranks if node_of_rank[r] == node] for node in nodes]
        if len(parts) == 1 or len({len(part) for part in parts}) > 1 or [*chain(*parts)] != ranks:
            return {}
        inside += parts
        across += [list(peers) for peers in zip(*parts, strict=True)]
    return {"ep_inside": inside, "ep_across": across}
