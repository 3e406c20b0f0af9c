"""Does it help to compute while rows travel?

    python -m benchmarks.overlap [--shapes quarter ...] [--json OUT]

Forward of one MoE layer with a shared expert beside it, 2048 tokens and one thread per rank, two ranks on two cores:

    nothing overlaps   plan, dispatch, experts, combine, then the shared expert
    shared expert      the shared expert while plan and dispatch run in another thread
    N chunks           tokens in N parts; the next part is dispatched in another thread while experts work on this one

`N chunks, in turn` does the same parts one after the other, so that what overlapping gains can be told from what parts
cost. `dispatch` and `combine` are the times of those steps alone: more than their sum cannot be gained.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.moe_layer import SHAPES, Dense, Shape, our_layer
from benchmarks.ranks import Together, on_ranks, time_together
from benchmarks.timing import print_table, write_results
from ep_engine.combine import combine
from ep_engine.dispatch import Arrival, dispatch
from ep_engine.moe_layer import MoELayer
from ep_engine.plan import make_plan
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Collective, Transport

TOKENS = 2048
CHUNKS = (2, 4)
Arrived = tuple[Tensor, Tensor, Arrival]


class Ways:
    """One layer's forward, in every order."""

    def __init__(self, layer: MoELayer, shared: Dense, x_TD: Tensor) -> None:
        self.layer, self.shared, self.x_TD = layer, shared, x_TD
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    @torch.no_grad()
    def dispatched(self, x_TD: Tensor) -> Arrived:
        """Router, plan and dispatch."""
        routing = self.layer.router(x_TD)
        return dispatch(x_TD, routing.weights_TK, make_plan(routing.ids_TK, self.layer.way[0]), self.layer.way)

    @torch.no_grad()
    def computed(self, arrived: Arrived) -> Tensor:
        """What the experts give, not yet at home."""
        z_RD: Tensor = self.layer.experts(*arrived)
        return z_RD

    @torch.no_grad()
    def in_turn(self, chunks: int = 1) -> Tensor:
        """One thing after the other."""
        parts = [self.dispatched(x) for x in self.x_TD.chunk(chunks)]
        return self.shared(self.x_TD) + torch.cat([combine(self.computed(part), part[2]) for part in parts])

    @torch.no_grad()
    def beside_shared(self) -> Tensor:
        """The shared expert during the dispatch."""
        waiting = self.thread.submit(self.dispatched, self.x_TD)
        y_TD = self.shared(self.x_TD)
        arrived = waiting.result()
        return y_TD + combine(self.computed(arrived), arrived[2])

    @torch.no_grad()
    def in_chunks(self, chunks: int) -> Tensor:
        """The next part travels while the experts work on this one."""
        parts = list(self.x_TD.chunk(chunks))
        waiting: Future[Arrived] = self.thread.submit(self.dispatched, parts[0])
        done: list[tuple[Tensor, Arrival]] = []
        for following in [*parts[1:], None]:
            arrived = waiting.result()
            if following is not None:
                waiting = self.thread.submit(self.dispatched, following)
            done.append((self.computed(arrived), arrived[2]))
        return self.shared(self.x_TD) + torch.cat([combine(z_RD, arrival) for z_RD, arrival in done])


def measure(rank: int, shape: Shape, rounds: int) -> dict[str, Any]:
    """All ways over both transports."""
    world = dist.group.WORLD
    x_TD = torch.randn(TOKENS, shape.hidden, generator=torch.Generator().manual_seed(rank))
    calls: dict[str, Callable[[], object]] = {}
    transports: dict[str, Transport] = {"collective": Collective(world), "shared_memory": SharedMemory(world, 60.0)}
    for name, transport in transports.items():
        ways = Ways(our_layer(shape, transport), Dense(shape), x_TD)
        calls[f"{name}, nothing overlaps"] = ways.in_turn
        calls[f"{name}, shared expert"] = ways.beside_shared
        for chunks in CHUNKS:
            calls[f"{name}, {chunks} chunks"] = lambda ways=ways, chunks=chunks: ways.in_chunks(chunks)
            calls[f"{name}, {chunks} chunks, in turn"] = lambda ways=ways, chunks=chunks: ways.in_turn(chunks)
        arrived = ways.dispatched(x_TD)
        z_RD = ways.computed(arrived)
        calls[f"{name}, dispatch"] = lambda ways=ways: ways.dispatched(x_TD)
        calls[f"{name}, combine"] = lambda z_RD=z_RD, arrival=arrived[2]: combine(z_RD, arrival)
        expected = ways.in_turn()
        for way in (ways.beside_shared, lambda ways=ways: ways.in_chunks(2)):
            torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-4)
    times = time_together({name: Together(call) for name, call in calls.items()}, rounds=rounds)
    return {"times": times, "ratios": ratios_of(times)}


def ratios_of(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Above 1 where overlapping is faster than the same work in turn."""
    ms = {name: found["median_ms"] for name, found in times.items()}
    ratios = {}
    for name in ("collective", "shared_memory"):
        ratios[f"{name}_shared_expert"] = ms[f"{name}, nothing overlaps"] / ms[f"{name}, shared expert"]
        for chunks in CHUNKS:
            ratios[f"{name}_{chunks}_chunks"] = ms[f"{name}, nothing overlaps"] / ms[f"{name}, {chunks} chunks"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["quarter"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.shapes:
        results[name] = on_ranks(measure, SHAPES[name], args.rounds, world_size=2)
        print_table(f"overlap, {name} {SHAPES[name]}", results[name]["times"], results[name]["ratios"])
    setting = {"tokens per rank": TOKENS, "ranks": 2, "rounds": args.rounds}
    write_results(args.json, "computing while rows travel, forward, float32", setting, results)


if __name__ == "__main__":
    main()
