"""What does watching the routers cost of a training step?

    python -m benchmarks.watch [--rounds 61] [--json OUT]

A MoE (D 512, 4 layers, E 64, k 6, 2048 tokens, float32) on one process with all threads. `step`: one step with
co-activation counted (`on`) and one without (`off`) take turns. That difference drowns in what else this machine does,
so it is also timed where it is spent: `watch` is the part of a step in which the counts are made (and the load-balance
loss, in both), `line` what a line of metrics needs, one in ten steps. `look` is what a save adds on every rank: the
counts since the last one. The solver that then compares the placement has a thread of the lowest priority, and is timed
by itself.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ranks import Together, all_times, on_ranks, summary
from benchmarks.timing import print_table, write_results
from benchmarks.trained_moe import MoEShape, make_new, run_config
from ep_engine.c2r.placement_watch import compare
from ep_engine.load_balance import RouterStatistics
from ep_engine.mesh import World, process_groups
from ep_engine.model import Watch
from ep_engine.placement import Placement
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer

CPU = torch.device("cpu")
DEVICES = 8
WARM_UP = 2
LINE_EVERY = 10


def measure(_: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Times of both, and of a look."""
    with process_groups(World(), CPU, 1, 300.0) as meshes:
        trainers = {}
        for name in ("on", "off"):
            config = run_config(
                folder,
                name,
                rows=4,
                model={"checkpoint": str(folder / "new")},
                train={"steps": 1000, "learning_rate": 1e-4, "min_learning_rate": 1e-4},
            )
            output = config.output.model_copy(update={"watch": name == "on"})
            trainers[name] = Trainer(resolve(config.model_copy(update={"output": output}), 1), meshes, CPU)
        threads = os.cpu_count() or 1
        inside: dict[str, list[float]] = {name: [] for name in trainers}
        calls = {}
        for name, trainer in trainers.items():
            trainer.stages[0].watch = _timed(trainer.watch, inside[name])
            calls[f"step {name}"] = Together(trainer.one_step, threads=threads)
            assert trainer.routing is not None, "the model has experts"
            calls[f"line {name}"] = Together(partial(trainer.routing.line, 1), threads=threads)
        times = all_times(calls, rounds=rounds, warm_up=WARM_UP)
        times |= {f"watch {name}": of[WARM_UP:] for name, of in inside.items()}
        routing = trainers["on"].routing
        assert routing is not None, "the model has experts"
        started = time.perf_counter()
        recent = routing.recent({})
        look_ms = (time.perf_counter() - started) * 1e3
        assert recent is not None, "it is counted"
        started = time.perf_counter()
        compare(Placement.contiguous(recent.num_experts, DEVICES, recent.num_layers), recent, 0, None)
        return {"times": times, "look_ms": look_ms, "solver_ms": (time.perf_counter() - started) * 1e3}


def _timed(watch: Watch, spent_ms: list[float]) -> Watch:
    def timed(x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        started = time.perf_counter()
        found = watch(x, routers)
        spent_ms.append((time.perf_counter() - started) * 1e3)
        return found

    return timed


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_new(folder, MoEShape())
        found = on_ranks(measure, folder, args.rounds, world_size=1)
    of = found["times"]
    pairs = [on / off - 1 for on, off in zip(of["step on"], of["step off"], strict=True)]
    times = {name: summary(each) for name, each in of.items()}
    more = {kind: times[f"{kind} on"]["median_ms"] - times[f"{kind} off"]["median_ms"] for kind in ("watch", "line")}
    step = times["step off"]["median_ms"]
    ratios = {
        "on_vs_off": times["step on"]["median_ms"] / step,
        "median_of_pairs": 1 + statistics.median(pairs),
        "timed_inside": 1 + (more["watch"] + more["line"] / LINE_EVERY) / step,
    }
    result = {"times": times, "ratios": ratios, "pairs": pairs, "look_ms": found["look_ms"]}
    result["solver_ms"] = found["solver_ms"]
    print_table("a step, watched and not", times, ratios)
    setting = {"rounds": args.rounds, "shape": vars(MoEShape()), "tokens": 4 * 512}
    write_results(args.json, __doc__.splitlines()[0], setting, {"watch": result})


if __name__ == "__main__":
    main()
