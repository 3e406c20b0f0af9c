"""How fast do messages go from rank to rank through shared memory, and through gloo?

    python -m benchmarks.all_to_all [--json OUT]

`exchange`: remote bytes of every rank, packed already, to memory where the receiver can read them; gloo's
all_to_all_single beside the shared-memory transport beside a streaming memcpy of as many bytes by every rank at once.
`pack_to_expand`: from tokens to the rows that experts multiply: gather, exchange, gather again. Bytes are payload that
leaves a rank. Even: the same to every other rank. Skewed: half of it to the next one. Small exchanges are made one
after the other, 32 MiB between two barriers, and the time of one is given.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import Together, on_ranks, time_together
from benchmarks.timing import print_table, write_results
from ep_engine import ops
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Collective, Transport

DIM = 1024  # float32, 4 KiB a row
_TOGETHER = 32.0  # MiB between two barriers: ranks leave a barrier some tenths of a millisecond apart


def rows_to_send(rank: int, world_size: int, num_rows: int, skewed: bool) -> list[int]:
    """[P] rows to every rank; none to the own."""
    rows = [0] * world_size
    others = [p for p in range(world_size) if p != rank]
    share = num_rows // 2 // len(others) if skewed else num_rows // len(others)
    for p in others:
        rows[p] = share
    rows[(rank + 1) % world_size] += num_rows - sum(rows)
    return rows


def through(
    transport: Transport, x: Tensor, row_S: Tensor, send: list[int], recv: list[int], expand_N: Tensor | None = None
) -> Callable[[], Tensor]:
    """Gather, exchange and, if asked, gather again."""

    def call() -> Tensor:
        exchange = transport.begin(send, recv, DIM * 4, x.device, "benchmark")
        for part, out in exchange.parts:
            ops.gather_rows(x, row_S[part], out=out.view(torch.float32), streaming=exchange.streaming)
        received = exchange.finish().view(torch.float32)
        return received if expand_N is None else ops.gather_rows(received, expand_N)

    return call


def through_gloo(
    x: Tensor, row_S: Tensor | None, send: list[int], recv: list[int], expand_N: Tensor | None = None
) -> Callable[[], Tensor]:
    """The same with torch's own operations."""

    def call() -> Tensor:
        packed = x if row_S is None else x.index_select(0, row_S)
        received = packed.new_empty(sum(recv), DIM)
        dist.all_to_all_single(received, packed, recv, send)
        return received if expand_N is None else received.index_select(0, expand_N)

    return call


def measure(rank: int, mebibytes: float, skewed: bool, rounds: int) -> dict[str, Any]:
    """Times of every way for one size, on this rank and the others together."""
    world = dist.group.WORLD
    size = dist.get_world_size()
    transports: dict[str, Transport] = {"shared_memory": SharedMemory(world, 60.0), "collective": Collective(world)}
    send = rows_to_send(rank, size, int(mebibytes * 2**20) // (4 * DIM), skewed)
    recv = [rows_to_send(source, size, sum(send), skewed)[rank] for source in range(size)]
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sum(send), DIM, generator=generator)
    in_order = torch.arange(sum(send), dtype=torch.int32)
    row_S = torch.randperm(sum(send), generator=generator).int()
    expand_N = torch.randperm(sum(recv), generator=generator).int()
    target = torch.empty_like(x)
    calls = {
        "exchange gloo": through_gloo(x, None, send, recv),
        "exchange shared_memory": through(transports["shared_memory"], x, in_order, send, recv),
        "streaming memcpy": partial(ops.gather_rows, x, in_order, out=target, streaming=True),
        "pack_to_expand gloo": through_gloo(x, row_S.long(), send, recv, expand_N.long()),
        "pack_to_expand shared_memory": through(transports["shared_memory"], x, row_S, send, recv, expand_N),
        "pack_to_expand collective": through(transports["collective"], x, row_S, send, recv, expand_N),
    }
    assert torch.equal(calls["exchange gloo"](), calls["exchange shared_memory"]())
    expected = calls["pack_to_expand gloo"]()
    assert torch.equal(expected, calls["pack_to_expand shared_memory"]())
    assert torch.equal(expected, calls["pack_to_expand collective"]())
    times = max(1, round(_TOGETHER / mebibytes))
    repeated = {name: Together(partial(_repeat, call, times)) for name, call in calls.items()}
    found = time_together(repeated, rounds=rounds)
    return {name: {key: value / times for key, value in each.items()} for name, each in found.items()}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def ratios_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The named ratios, above 1 where shared memory is faster."""

    def over(other: str, name: str) -> float:
        return found[other]["median_ms"] / found[name]["median_ms"]

    return {
        "shared_memory_vs_gloo": over("exchange gloo", "exchange shared_memory"),
        "vs_nt_memcpy": over("streaming memcpy", "exchange shared_memory"),
        "pack_to_expand_vs_gloo": over("pack_to_expand gloo", "pack_to_expand shared_memory"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--mebibytes", type=float, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, Any] = {}
    for world_size in args.ranks:
        for mebibytes in args.mebibytes:
            for skewed in (False, True):
                found = on_ranks(measure, mebibytes, skewed, args.rounds, world_size=world_size)
                case = f"{world_size} ranks, {mebibytes:g} MiB, {'skewed' if skewed else 'even'}"
                results[case] = {"times": found, "ratios": ratios_of(found)}
                print_table(case, found, results[case]["ratios"])
    setting = {"dim": DIM, "dtype": "float32", "rounds": args.rounds}
    write_results(args.json, "messages between ranks of one machine, one thread each", setting, results)


if __name__ == "__main__":
    main()
