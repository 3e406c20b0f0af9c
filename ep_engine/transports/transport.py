"""Transport: how messages get from rank to rank. The only place that moves them; gradients are the callers' business.

An exchange sends `send_rows[p]` consecutive messages to rank p of its group, the others first in rank order and the own
rank's last, and what arrives stands in the same order. The caller writes the messages where the transport says, which
may be another rank's memory, and then finishes the exchange. Messages for the own rank are never sent.

Shape letters:  P ranks of the group   S messages sent   R messages received   B bytes of one message
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.stopwatch import EXCHANGE, timed


def lost_peer(error: RuntimeError, group: dist.ProcessGroup, axis: str, where: str) -> Fault:
    """The fault that a failed collective is: who noticed it, in which group, during what."""
    words = str(error).splitlines()[0][:160]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return Fault(
        f"rank {rank} of {size} in group {axis}: {where} did not finish ({words}); a peer died or hangs, look at the "
        "first rank that failed"
    )


class Exchange(Protocol):
    """Messages on their way. Write those of each part, then `finish`."""

    parts: list[tuple[slice, Tensor]]
    """Which of the S messages, and (n, B) uint8 to write them to; together they are all."""
    streaming: bool
    """Whether another core will read what is written: then it should not stay in this core's caches."""

    def finish(self) -> Tensor:
        """Wait for all that comes: (R, B) uint8."""
        ...


class Transport(Protocol):
    """Moves messages between the ranks of one group."""

    rank: int
    size: int

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """Row p goes to rank p; returns (P, N) int32, row p from rank p."""
        ...

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> Exchange:
        """Begin to exchange messages of `num_bytes` bytes; `where` names the call in a fault."""
        ...


@dataclass
class Kept:
    """Messages that stay here."""

    received_RB: Tensor
    streaming: bool = False
    parts: list[tuple[slice, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [(slice(0, len(self.received_RB)), self.received_RB)]

    def finish(self) -> Tensor:
        """The messages themselves."""
        return self.received_RB


class Alone:
    """A group of one rank: nothing moves."""

    rank, size = 0, 1

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """What comes is what goes."""
        return counts_PN

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> Exchange:
        """Room for the messages."""
        return Kept(torch.empty(sum(recv_rows), num_bytes, dtype=torch.uint8, device=device))


class Collective:
    """`all_to_all_single` of torch.distributed: gloo on CPU, NCCL on GPUs. Reads the counts on the host.

    Args:
        group: the ranks.
        down: the same ranks over connections of their own, for rows to lower ranks; a connection of gloo carries one
            direction at a time. None: all rows go over `group`.
    """

    def __init__(self, group: dist.ProcessGroup, down: dist.ProcessGroup | None = None) -> None:
        self.group, self.down = group, down
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange_counts(self, counts_PN: Tensor, where: str) -> Tensor:
        """A few int32 to and from every rank."""
        received_PN = torch.empty_like(counts_PN)
        with self._watched(where):
            dist.all_to_all_single(received_PN, counts_PN.contiguous(), group=self.group)
        return received_PN

    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, where: str
    ) -> Exchange:
        """A buffer for what is sent, and one for what comes, the own messages in it already."""
        return _CollectiveExchange(self, send_rows, recv_rows, num_bytes, device, where)

    def all_to_all(self, out_RB: Tensor, given_SB: Tensor, recv: list[int], send: list[int], where: str) -> None:
        """Rows from and to every other rank; the own counts are 0."""
        r, rest = self.rank, [0] * (self.size - self.rank)
        given, taken = sum(send[:r]), sum(recv[:r])
        with self._watched(where):
            if self.down is None:
                dist.all_to_all_single(out_RB, given_SB, recv, send, group=self.group)
                return
            below, above = [*send[:r], *rest], [0] * r + send[r:]
            ways = (
                (out_RB[taken:], given_SB[:given], [0] * r + recv[r:], below, self.down),
                (out_RB[:taken], given_SB[given:], [*recv[:r], *rest], above, self.group),
            )
            begun = [
                dist.all_to_all_single(out, rows, come, go, group=group, async_op=True)
                for out, rows, come, go, group in ways
            ]
            for work in begun:
                work.wait()

    @contextmanager
    def _watched(self, where: str) -> Iterator[None]:
        """A collective's failure is a Fault."""
        try:
            yield
        except RuntimeError as error:
            raise lost_peer(error, self.group, "ep", where) from error


class _CollectiveExchange:
    streaming = False

    def __init__(
        self,
        transport: Collective,
        send_rows: list[int],
        recv_rows: list[int],
        num_bytes: int,
        device: torch.device,
        where: str,
    ) -> None:
        own = send_rows[transport.rank]
        self.transport, self.where = transport, where
        self.num_sent, self.num_foreign = sum(send_rows) - own, sum(recv_rows) - own
        self.send_rows, self.recv_rows = (
            [0 if p == transport.rank else n for p, n in enumerate(counts)] for counts in (send_rows, recv_rows)
        )
        self.sent_SB = torch.empty(self.num_sent, num_bytes, dtype=torch.uint8, device=device)
        self.received_RB = torch.empty(self.num_foreign + own, num_bytes, dtype=torch.uint8, device=device)
        self.parts = [
            (slice(0, self.num_sent), self.sent_SB),
            (slice(self.num_sent, self.num_sent + own), self.received_RB[self.num_foreign :]),
        ]

    def finish(self) -> Tensor:
        """One all-to-all of everything but the own messages."""
        foreign = self.received_RB[: self.num_foreign]
        self.transport.all_to_all(foreign, self.sent_SB, self.recv_rows, self.send_rows, self.where)
        return self.received_RB


@dataclass(frozen=True)
class Link:
    """One layer's end of the transport: moves messages and writes them into the ledger."""

    transport: Transport
    ledger: Ledger
    layer: int
    tiers: list[str] | None = None  # [P] of the ranks of the transport's group; None: those of the ledger

    @timed(EXCHANGE)
    def exchange_counts(self, counts_PN: Tensor) -> Tensor:
        """Counts from every rank, (P, N) int32."""
        return self.transport.exchange_counts(counts_PN, f"counts of layer {self.layer}")

    @timed(EXCHANGE)
    def begin(
        self, send_rows: list[int], recv_rows: list[int], num_bytes: int, device: torch.device, direction: str
    ) -> Exchange:
        """Begin an exchange; `direction` is one of the ledger's."""
        self.record(send_rows, num_bytes, direction)
        where = f"{direction} of layer {self.layer}"
        return self.transport.begin(send_rows, recv_rows, num_bytes, device, where)

    @timed(EXCHANGE)
    def finish(self, exchange: Exchange) -> Tensor:
        """Wait for all that comes: (R, B) uint8."""
        return exchange.finish()

    def record(self, send_rows: list[int], num_bytes: int, direction: str) -> None:
        """Write messages into the ledger."""
        self.ledger.record_bytes(self.layer, direction, send_rows, num_bytes, self.tiers)
