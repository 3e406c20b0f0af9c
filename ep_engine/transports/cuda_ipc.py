"""Transport between the GPU ranks of one machine: a kernel writes a message into the memory of the rank it is for.

Every rank has an arena on its device that all ranks of the group map (torch's symmetric memory, so that several ranks
may share one device and a killed rank leaves nothing behind). Hosts tell each other places through control blocks in
shared memory, with time-outs; streams wait for each other's work through events between processes, so no kernel spins:

    ready    recorded before a rank tells the others where to write: what was in that place has been read by then
    written  recorded behind the kernels that write, before a rank says that it is done

A host re-records an event only after all others have ordered their waits for what it stood for before: it has heard
from each in between. What arrives is copied out of the arena, which so has to hold one exchange and not all layers'.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from ep_engine.transports.regions import Regions
from ep_engine.transports.shared_control import SharedControl, gathered, refuse_together
from ep_engine.transports.shared_memory import open_in_arenas


class CudaIpc:
    """Exchanges through device memory.

    Args:
        group: ranks of one machine, at most ops.MAX_SHARERS, each with this device as its current one.
        timeout_s: a rank whose host waits so long for another's fails.
        capacity: bytes of the arena, the same on all ranks.
        device: of this rank.

    Raises:
        Fault: on every rank, if one cannot reach the memory of another.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, capacity: int, device: torch.device) -> None:
        self._control = SharedControl(group, timeout_s)
        self.rank, self.size = self._control.rank, self._control.size
        refuse_together(_unreachable(gathered(device.index, group), device), "cuda_ipc", group)
        arena = symmetric_memory.empty(capacity, dtype=torch.uint8, device=device)
        self._memory = symmetric_memory.rendezvous(arena, group)
        self._arenas = [self._memory.get_buffer(p, (capacity,), torch.uint8) for p in range(self.size)]
        self._regions = Regions(0, capacity)
        own = [torch.cuda.Event(interprocess=True) for _ in range(2)]
        handles = gathered([event.ipc_handle() for event in own], group)
        self._ready, self._written = (
            [
                own[i] if p == self.rank else torch.cuda.Event.from_ipc_handle(device, of[i])
                for p, of in enumerate(handles)
            ]
            for i in range(2)
        )

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """Through the hosts, which wait for their devices."""
        return self._control.exchange_counts(counts_PN.cpu(), where).to(counts_PN.device)

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> "_DeviceExchange":
        """Room in this rank's arena, and the places in those of the others."""
        size = sum(recv_rows) * num_bytes
        first = self._regions.take(size)
        if first is None:
            raise self._control.no_room(size, where)
        self._ready[self.rank].record()
        number, parts = open_in_arenas(self._control, self._arenas, first, send_rows, recv_rows, num_bytes, where)
        self._wait_for_others(self._ready)
        return _DeviceExchange(self, number, where, slice(first, first + size), num_bytes, parts)

    def finish(self, number: int, where: str, region: slice) -> Tensor:
        """End an exchange: the bytes that came, copied."""
        self._written[self.rank].record()
        self._control.close(number, where)
        self._wait_for_others(self._written)
        received = self._arenas[self.rank][region].clone()
        if region.stop > region.start:
            self._regions.give_back(region.start)
        return received

    def _wait_for_others(self, events: list[torch.cuda.Event]) -> None:
        for p, event in enumerate(events):
            if p != self.rank:
                event.wait()


class _DeviceExchange:
    streaming = False

    def __init__(
        self,
        transport: CudaIpc,
        number: int,
        where: str,
        region: slice,
        num_bytes: int,
        parts: list[tuple[slice, Tensor]],
    ) -> None:
        self.transport, self.number, self.where = transport, number, where
        self.region, self.num_bytes, self.parts = region, num_bytes, parts

    def finish(self) -> Tensor:
        return self.transport.finish(self.number, self.where, self.region).view(-1, self.num_bytes)


def _unreachable(devices: list[int], own: torch.device) -> str:
    """Why this device cannot write into another's memory; nothing if it can."""
    for peer in devices:
        if peer != own.index and not torch.cuda.can_device_access_peer(own, peer):
            return f"device {own.index} cannot reach the memory of device {peer}"
    return ""
