"""Transport between the ranks of one machine: a message is written once, into the memory of the rank it is for.

Every rank has an arena, anonymous memory (memfd) that all ranks of the group map: when the last process ends, however
it ends, nothing is left behind. The arena is as large as an address space allows and takes memory only where it was
written. What arrives stays where it arrived, as a tensor, until nothing refers to it.
"""

import mmap
import os
import secrets
import socket
import weakref
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import ops
from ep_engine.errors import Fault

_ALIGNMENT = 4096
_CAPACITY = 1 << 36  # of address space, not of memory


class SharedMemory:
    """Exchanges through arenas; see csrc/shared_memory.h for the protocol.

    Args:
        group: ranks of one machine, at most ops.MAX_SHARERS.
        timeout_s: a rank that waits so long for another fails.
        capacity: bytes of the arena.

    Raises:
        Fault: on every rank, if one cannot map the memory of another.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, capacity: int = _CAPACITY) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._number = 0
        self._regions = _Regions(ops.SHARED_CONTROL_BYTES, capacity)
        own = os.memfd_create("ep_engine")
        try:
            os.ftruncate(own, capacity)
            self._own = mmap.mmap(own, capacity)
            token = secrets.token_bytes(8)
            self._own[:8] = token
            peers = _gathered((os.getpid(), own, capacity, token, socket.gethostname()), group)
            mapped, reason = _map_all(peers, self.rank, self._own)
            reasons = [found for found in _gathered(reason, group) if found]  # also keeps `own` open until all have it
        finally:
            os.close(own)
        if reasons:
            raise Fault(f"shared_memory between {self.size} ranks: {reasons[0]}; use transport collective")
        self._shared = ops.SharedArenas(
            [torch.frombuffer(arena, dtype=torch.uint8) for arena in mapped],
            torch.tensor([_watch(peer[0]) for peer in peers], dtype=torch.int32),
            self.rank,
            timeout_s,
        )

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """Through the control blocks."""
        result, received_PN = self._shared.counts(self._next(), counts_PN)
        self._check(result, where)
        return received_PN

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> "_SharedExchange":
        """Room in this rank's arena, and the places in those of the others."""
        received_RB, first = self._room(sum(recv_rows), num_bytes, where)
        order = [*(p for p in range(self.size) if p != self.rank), self.rank]
        sizes_P = torch.tensor([recv_rows, send_rows], dtype=torch.int64) * num_bytes
        place_P = torch.empty(self.size, dtype=torch.int64)
        for p in order:
            place_P[p] = first
            first += recv_rows[p] * num_bytes
        number = self._next()
        result, destination_P = self._shared.open(number, place_P, sizes_P[0], sizes_P[1])
        self._check(result, where)
        parts = self._parts(send_rows, num_bytes, order, destination_P.tolist())
        return _SharedExchange(self, number, where, received_RB, parts)

    def finish(self, number: int, where: str) -> None:
        """End an exchange."""
        self._check(self._shared.close(number), where)

    def _parts(
        self, send_rows: list[int], num_bytes: int, order: list[int], destination: list[int]
    ) -> list[tuple[slice, Tensor]]:
        parts, first = [], 0
        for p in order:
            end, size = first + send_rows[p], send_rows[p] * num_bytes
            if size:
                there = self._shared.arenas[p][destination[p] : destination[p] + size]
                parts.append((slice(first, end), there.view(send_rows[p], num_bytes)))
            first = end
        return parts

    def _room(self, num_rows: int, num_bytes: int, where: str) -> tuple[Tensor, int]:
        """Memory of the own arena as a tensor that gives it back at its end, and where it begins."""
        size = num_rows * num_bytes
        first = self._regions.take(size)
        if first is None:
            self._shared.fail()
            raise Fault(
                f"rank {self.rank} of {self.size}: {where} needs {size} bytes, the shared arena has no room for them "
                "beside what is in use; use fewer tokens per rank"
            )
        if size == 0:
            return torch.empty(0, num_bytes, dtype=torch.uint8), first
        memory = np.frombuffer(self._own, dtype=np.uint8, count=size, offset=first)
        weakref.finalize(memory, self._regions.give_back, first).atexit = False
        return torch.from_numpy(memory).view(num_rows, num_bytes), first

    def _next(self) -> int:
        self._number = (self._number + 1) % 2**32
        return self._number

    def _check(self, result: int, where: str) -> None:
        found = ops.shared_fault(result)
        if found is None:
            return
        self._shared.fail()
        peer, reason = found
        raise Fault(
            f"rank {self.rank} of {self.size} in group ep: {where} did not finish, rank {peer} {reason}; look at the "
            "first rank that failed"
        )


class _SharedExchange:
    streaming = True

    def __init__(
        self,
        transport: SharedMemory,
        number: int,
        where: str,
        received_RB: Tensor,
        parts: list[tuple[slice, Tensor]],
    ) -> None:
        self.transport, self.number, self.where = transport, number, where
        self.received_RB, self.parts = received_RB, parts

    def finish(self) -> Tensor:
        self.transport.finish(self.number, self.where)
        return self.received_RB


class _Regions:
    """Which parts of an arena are in use. Parts come back from any thread, at any time."""

    def __init__(self, first: int, end: int) -> None:
        self._free = [(first, end)]  # ascending, none touching
        self._used: dict[int, int] = {}
        self._coming_back: deque[int] = deque()

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin that nobody uses; None if there is no such place."""
        self._collect()
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        if size == 0:
            return self._free[0][0] if self._free else 0
        for i, (first, end) in enumerate(self._free):
            if end - first >= size:
                self._free[i : i + 1] = [(first + size, end)] if end - first > size else []
                self._used[first] = size
                return first
        return None

    def give_back(self, first: int) -> None:
        """Done with what begins at `first`. Only notes it down: a collector may call this in the midst of `take`."""
        self._coming_back.append(first)

    def _collect(self) -> None:
        while self._coming_back:
            first = self._coming_back.popleft()
            self._free.append((first, first + self._used.pop(first)))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for first, end in self._free:
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((first, end))
        self._free = merged


def _gathered(value: object, group: dist.ProcessGroup) -> list:  # type: ignore[type-arg]
    values: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _map_all(peers: list[tuple[int, int, int, bytes, str]], own: int, mine: mmap.mmap) -> tuple[list[mmap.mmap], str]:
    """All arenas as mapped here, or why not."""
    mapped = []
    for rank, (process, memory, capacity, token, host) in enumerate(peers):
        if rank == own:
            mapped.append(mine)
            continue
        try:
            opened = os.open(f"/proc/{process}/fd/{memory}", os.O_RDWR)
            try:
                mapped.append(mmap.mmap(opened, capacity))
            finally:
                os.close(opened)
        except OSError as error:
            return [], f"rank {own} cannot map the memory of rank {rank} on {host} ({error.strerror})"
        if mapped[-1][:8] != token:
            return [], f"rank {own} found other memory where that of rank {rank} on {host} should be"
    return mapped, ""


def _watch(process: int) -> int:
    """A descriptor that tells when a process has ended; -1 where there is no such thing, and time-outs must do."""
    try:
        return os.pidfd_open(process)
    except OSError:
        return -1
