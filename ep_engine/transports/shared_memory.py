"""Transport between the CPU ranks of one machine: a message is written once, into the memory of the rank it is for.

The arena is as large as an address space allows and takes memory only where it was written. What arrives stays where
it arrived, as a tensor, until nothing refers to it.
"""

import weakref

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import ops
from ep_engine.transports.regions import Regions
from ep_engine.transports.shared_control import SharedControl

_CAPACITY = 1 << 36  # of address space, not of memory


class SharedMemory:
    """Exchanges through the arenas of a `SharedControl`, whose arguments and faults it has."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, capacity: int = _CAPACITY) -> None:
        self._control = SharedControl(group, timeout_s, capacity)
        self.rank, self.size = self._control.rank, self._control.size
        self._regions = Regions(ops.SHARED_CONTROL_BYTES, capacity)

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """Through the control blocks."""
        return self._control.exchange_counts(counts_PN, where)

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> "_SharedExchange":
        """Room in this rank's arena, and the places in those of the others."""
        received_RB, first = self._room(sum(recv_rows), num_bytes, where)
        number, parts = open_in_arenas(
            self._control, self._control.arenas, first, send_rows, recv_rows, num_bytes, where
        )
        return _SharedExchange(self._control, number, where, received_RB, parts)

    def _room(self, num_rows: int, num_bytes: int, where: str) -> tuple[Tensor, int]:
        """Memory of the own arena as a tensor that gives it back at its end, and where it begins."""
        size = num_rows * num_bytes
        first = self._regions.take(size)
        if first is None:
            raise self._control.no_room(size, where)
        if size == 0:
            return torch.empty(0, num_bytes, dtype=torch.uint8), first
        memory = np.frombuffer(self._control.own, dtype=np.uint8, count=size, offset=first)
        weakref.finalize(memory, self._regions.give_back, first).atexit = False
        return torch.from_numpy(memory).view(num_rows, num_bytes), first


class _SharedExchange:
    streaming = True

    def __init__(
        self,
        control: SharedControl,
        number: int,
        where: str,
        received_RB: Tensor,
        parts: list[tuple[slice, Tensor]],
    ) -> None:
        self.control, self.number, self.where = control, number, where
        self.received_RB, self.parts = received_RB, parts

    def finish(self) -> Tensor:
        self.control.close(self.number, self.where)
        return self.received_RB


def open_in_arenas(
    control: SharedControl,
    arenas: list[Tensor],
    first: int,
    send_rows: list[int],
    recv_rows: list[int],
    num_bytes: int,
    where: str,
) -> tuple[int, list[tuple[slice, Tensor]]]:
    """Begin an exchange through arenas: its number, and its parts.

    Args:
        control: of the group.
        arenas: of all ranks, as mapped here, uint8.
        first: byte of the own arena from which on messages are to arrive, the own ones last.
        send_rows: [P] messages to every rank.
        recv_rows: [P] messages from every rank.
        num_bytes: of a message.
        where: names the exchange in a fault.
    """
    order = [*(p for p in range(control.size) if p != control.rank), control.rank]
    places = [0] * control.size
    for p in order:
        places[p] = first
        first += recv_rows[p] * num_bytes
    recv, send = ([rows * num_bytes for rows in counts] for counts in (recv_rows, send_rows))
    number, destination = control.open(places, recv, send, where)
    parts, sent = [], 0
    for p in order:
        if send_rows[p]:
            there = arenas[p][destination[p] : destination[p] + send[p]]
            parts.append((slice(sent, sent + send_rows[p]), there.view(send_rows[p], num_bytes)))
        sent += send_rows[p]
    return number, parts
