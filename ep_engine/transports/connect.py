"""Which transport carries the messages of an expert-parallel group, and over how many hops.

collective      all_to_all_single of torch.distributed, everywhere
shared_memory   CPU ranks of one machine
cuda_ipc        GPU ranks of one machine; it has not been measured, so auto does not choose it
hierarchical    one copy per node between nodes, then inside the node
auto            the best of these that the ranks allow; what it chose is logged once
"""

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.mesh import Meshes
from ep_engine.placement import Cut
from ep_engine.transports.cuda_ipc import CudaIpc
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Alone, Collective, Link, Transport

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """Transports of every hop, and the tiers of their ranks seen from this one."""

    hops: tuple[tuple[Transport, list[str]], ...]

    def links(self, ledger: Ledger, layer: int) -> tuple[Link, ...]:
        """One layer's ends."""
        return tuple(Link(transport, ledger, layer, tiers) for transport, tiers in self.hops)


def connect(
    name: str,
    meshes: Meshes,
    device: torch.device,
    cut: Cut,
    *,
    one_hop: bool = False,
    largest_exchange: int = 0,
) -> Connection:
    """Connect the ranks of this rank's expert-parallel group; all ranks call it with the same name.

    Args:
        name: one of these; `resolve` has checked that the ranks allow it.
        meshes: the ranks.
        device: where messages lie.
        cut: of the placement's tree by the group, in parts where experts are split.
        one_hop: `auto` does not choose hierarchical.
        largest_exchange: bytes that a rank can be sent at once, for cuda_ipc.

    Raises:
        Fault: on every rank, if ranks of one machine cannot share memory.
    """
    group = meshes.dispatch
    tiers = meshes.ep_tiers()
    if dist.get_world_size(group) == 1:
        return Connection(((Alone(), tiers),))
    if name == "auto":
        return _best(group, meshes, device, hierarchical=not one_hop and _is_cut(meshes, cut))
    if name == "shared_memory":
        return Connection(((SharedMemory(group, meshes.timeout_s), tiers),))
    if name == "cuda_ipc":
        # Twice, because an exchange may begin before the last has been read.
        return Connection(((CudaIpc(group, meshes.timeout_s, 2 * largest_exchange, device), tiers),))
    if name == "hierarchical":
        return _over_nodes(meshes, device)
    return Connection(((Collective(group, meshes.down.get("dispatch")), tiers),))


def _best(group: dist.ProcessGroup, meshes: Meshes, device: torch.device, *, hierarchical: bool) -> Connection:
    tiers, chosen, why = meshes.ep_tiers(), "collective", "ranks of several nodes, or on GPUs"
    connection = Connection(((Collective(group, meshes.down.get("dispatch")), tiers),))
    if device.type == "cpu" and "network" not in tiers:
        try:
            connection, chosen, why = (
                Connection(((SharedMemory(group, meshes.timeout_s), tiers),)),
                "shared_memory",
                "one node",
            )
        except Fault as fault:  # raised on all ranks or on none
            why = str(fault)
    elif hierarchical:
        connection, chosen, why = _over_nodes(meshes, device), "hierarchical", "several nodes"
    if dist.get_rank() == 0:
        _log.warning("transport of the experts: %s (%s)", chosen, why)
    return connection


def _over_nodes(meshes: Meshes, device: torch.device) -> Connection:
    assert meshes.ep_across is not None, "checked before"
    assert meshes.ep_inside is not None, "checked before"
    across, inside = Collective(meshes.ep_across, meshes.down.get("ep_across")), meshes.ep_inside
    near: Transport = SharedMemory(inside, meshes.timeout_s) if device.type == "cpu" else Collective(inside)
    tiers = ["self" if rank == across.rank else "network" for rank in range(across.size)]
    near_tiers = ["self" if rank == near.rank else "node" for rank in range(near.size)]
    return Connection(((across, tiers), (near, near_tiers)))


def _is_cut(meshes: Meshes, cut: Cut) -> bool:
    inside = meshes.ep_inside
    return inside is not None and dist.get_world_size(inside) in (1, *cut.group_sizes_of_ranks)
