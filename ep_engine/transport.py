"""Transport: how rows get from rank to rank. The only place that moves them; gradients are the callers' business.

Every transport sends `send_rows[p]` consecutive rows to rank p of its group, the others first in rank order and the
own rank's last, and returns what arrived in the same order. Rows for the own rank are copied and never sent.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger


def lost_peer(error: RuntimeError, group: dist.ProcessGroup, axis: str, where: str) -> Fault:
    """The fault that a failed collective is: who noticed it, in which group, during what."""
    words = str(error).splitlines()[0][:160]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return Fault(
        f"rank {rank} of {size} in group {axis}: {where} did not finish ({words}); a peer died or hangs, look at the "
        "first rank that failed"
    )


class Transport(Protocol):
    """Moves rows between the ranks of one expert-parallel group."""

    rank: int
    size: int

    def exchange_counts(self, rows_per_rank_P: Tensor, where: str) -> Tensor:
        """Tell every rank how many rows it will get; returns the rows to expect from each, own rank included."""
        ...

    def exchange(self, rows: Tensor, send_rows: list[int], recv_rows: list[int], where: str) -> Tensor:
        """Send rows (sum of send_rows, ...) and return (sum of recv_rows, ...); `where` names the call in a fault."""
        ...


class Alone:
    """A group of one rank: nothing moves."""

    rank, size = 0, 1

    def exchange_counts(self, rows_per_rank_P: Tensor, where: str) -> Tensor:
        """What comes is what goes."""
        return rows_per_rank_P

    def exchange(self, rows: Tensor, send_rows: list[int], recv_rows: list[int], where: str) -> Tensor:
        """The rows themselves."""
        return rows


class Collective:
    """`all_to_all_single` of torch.distributed: gloo on CPU, NCCL on GPUs. Reads the counts on the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange_counts(self, rows_per_rank_P: Tensor, where: str) -> Tensor:
        """One int32 to and from every rank."""
        received_P = torch.empty_like(rows_per_rank_P)
        self._all_to_all(received_P, rows_per_rank_P, None, None, where)
        return received_P

    def exchange(self, rows: Tensor, send_rows: list[int], recv_rows: list[int], where: str) -> Tensor:
        """One all-to-all of everything but the own rows."""
        own, total = send_rows[self.rank], sum(recv_rows)
        received = rows.new_empty(total, *rows.shape[1:])
        recv, send = ([0 if p == self.rank else n for p, n in enumerate(counts)] for counts in (recv_rows, send_rows))
        self._all_to_all(received[: total - own], rows[: len(rows) - own], recv, send, where)
        received[total - own :] = rows[len(rows) - own :]
        return received

    def _all_to_all(
        self, out: Tensor, given: Tensor, recv: list[int] | None, send: list[int] | None, where: str
    ) -> None:
        try:
            dist.all_to_all_single(out, given.contiguous(), recv, send, group=self.group)
        except RuntimeError as error:
            raise lost_peer(error, self.group, "ep", where) from error


@dataclass(frozen=True)
class Link:
    """One layer's end of the transport: moves rows and writes them into the ledger."""

    transport: Transport
    ledger: Ledger
    layer: int

    def exchange_counts(self, rows_per_rank_P: Tensor) -> Tensor:
        """Rows to expect from every rank, (P,) int32."""
        return self.transport.exchange_counts(rows_per_rank_P, f"counts of layer {self.layer}")

    def exchange(self, rows: Tensor, send_rows: list[int], recv_rows: list[int], direction: str) -> Tensor:
        """Move rows; `direction` is one of the ledger's."""
        bytes_per_row = rows.element_size() * rows[0:1].numel() if len(rows) else 0
        self.ledger.record_bytes(self.layer, direction, send_rows, bytes_per_row)
        return self.transport.exchange(rows, send_rows, recv_rows, f"{direction} of layer {self.layer}")
