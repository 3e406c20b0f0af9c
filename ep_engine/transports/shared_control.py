"""What ranks of one machine tell each other through memory: counts, places, that a rank is there, is done, has failed.

Every rank has an arena, anonymous memory (memfd) that all ranks of the group map: when the last process ends, however
it ends, nothing is left behind. It begins with a control block; what follows is the transports' business.
"""

import mmap
import os
import secrets
import socket

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import ops
from ep_engine.errors import Fault


class SharedControl:
    """The control blocks of a group; see csrc/shared_memory.h for the protocol.

    Args:
        group: ranks of one machine, at most ops.MAX_SHARERS.
        timeout_s: a rank that waits so long for another fails.
        capacity: bytes of the arena, the control block included.

    Attributes:
        own: the memory of this rank.
        arenas: that of all ranks as mapped here, uint8 tensors.

    Raises:
        Fault: on every rank, if one cannot map the memory of another.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, capacity: int = ops.SHARED_CONTROL_BYTES) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._number = 0
        memory = os.memfd_create("ep_engine")
        try:
            os.ftruncate(memory, capacity)
            self.own = mmap.mmap(memory, capacity)
            token = secrets.token_bytes(8)
            self.own[:8] = token
            peers = gathered((os.getpid(), memory, capacity, token, socket.gethostname()), group)
            mapped, reason = _map_all(peers, self.rank, self.own)
            refuse_together(reason, f"shared memory between {self.size} ranks", group)  # and keeps `memory` till then
        finally:
            os.close(memory)
        self.arenas = [torch.frombuffer(arena, dtype=torch.uint8) for arena in mapped]
        processes = torch.tensor([_watch(peer[0]) for peer in peers], dtype=torch.int32)
        self._shared = ops.SharedArenas(self.arenas, processes, self.rank, timeout_s)

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """Row p of int32 counts goes to rank p; returns (P, N), row p from rank p. Counts lie on the CPU."""
        result, received_PN = self._shared.counts(self._next(), counts_PN)
        self._check(result, where)
        return received_PN

    def open(self, place_P: list[int], receive_P: list[int], send_P: list[int], where: str) -> tuple[int, list[int]]:
        """Begin an exchange: its number, and where in every rank's arena this rank's bytes go.

        Args:
            place_P: where in the own arena each rank's bytes go.
            receive_P: how many bytes come from each.
            send_P: how many go to each.
            where: names the exchange in a fault.
        """
        number = self._next()
        result, destination_P = self._shared.open(number, *(torch.tensor(v) for v in (place_P, receive_P, send_P)))
        self._check(result, where)
        return number, destination_P.tolist()

    def close(self, number: int, where: str) -> None:
        """Say that all is written and wait until all others have said so."""
        self._check(self._shared.close(number), where)

    def no_room(self, num_bytes: int, where: str) -> Fault:
        """What to raise if the arena is full; tells the others."""
        self._shared.fail()
        return Fault(
            f"rank {self.rank} of {self.size}: {where} needs {num_bytes} bytes, the shared arena has no room for them "
            "beside what is in use; use fewer tokens per rank"
        )

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


def refuse_together(reason: str, what: str, group: dist.ProcessGroup) -> None:
    """Fault on every rank of the group if one has a reason."""
    reasons = [found for found in gathered(reason, group) if found]
    if reasons:
        raise Fault(f"{what}: {reasons[0]}; use transport collective")


def gathered(value: object, group: dist.ProcessGroup) -> list:  # type: ignore[type-arg]
    """What every rank has given."""
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
