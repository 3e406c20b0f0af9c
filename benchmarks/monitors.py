"""What does it cost to know loads, importances and entropies, and where the time of a step goes?

    python -m benchmarks.monitors [--rounds 21] [--json OUT]

The MoE of benchmarks/watch.py, one process with all threads. `step` and `step timed` take turns; their difference is
less than what else a machine does, so costs are also timed where they are spent: `count` is what every step pays for
loads, importances and entropies of its layers, `marks` what a timed step pays, one of those between two lines, and
`passed` what all other steps pay for being able to.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import Together, all_times, on_ranks, summary
from benchmarks.timing import print_table, write_results
from benchmarks.trained_moe import MoEShape, make_new, run_config
from ep_engine import stopwatch
from ep_engine.load_balance import RouterStatistics, router_statistics
from ep_engine.mesh import World, process_groups
from ep_engine.resolve import resolve
from ep_engine.router import Routing
from ep_engine.training.trainer import Trainer
from ep_engine.training.watch import RouterWatch

CPU = torch.device("cpu")
TOKENS = 4 * 512
WARM_UP = 2
CALLS = 100_000


def measure(_: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Times of steps and counts, marks of a step, and nanoseconds of a mark and of a call that leaves none."""
    with process_groups(World(), CPU, 1, 300.0) as meshes:
        model = {"checkpoint": str(folder / "new")}
        train = {"steps": 1000, "learning_rate": 1e-4, "min_learning_rate": 1e-4}
        trainer = Trainer(resolve(run_config(folder, "run", rows=4, model=model, train=train), 1), meshes, CPU)
        threads = os.cpu_count() or 1
        marks: list[int] = []

        def timed() -> None:
            with stopwatch.running(CPU) as watch:
                trainer.one_step()
            marks.append(len(watch._marks))

        shape = MoEShape()
        logits_TE = torch.randn(TOKENS, trainer.watch.experts_L[0])
        ids_TK = logits_TE.topk(shape.top_k).indices
        router = router_statistics(Routing(ids_TK, torch.ones(ids_TK.shape), logits_TE))
        calls: dict[str, Callable[[], object]] = {
            "step": trainer.one_step,
            "step timed": timed,
            "count": lambda: _count(trainer.watch, router),
        }
        times = all_times({n: Together(c, threads=threads) for n, c in calls.items()}, rounds=rounds, warm_up=WARM_UP)
    called = stopwatch.timed("other")(int)
    off_ns = _ns(called) - _ns(int)
    with stopwatch.running(CPU):
        on_ns = _ns(called) - _ns(int)
    return {"times": times, "marks": marks[-1], "mark_ns": on_ns / 2, "passed_ns": off_ns / 2}


def _count(watch: RouterWatch, router: RouterStatistics) -> None:
    for layer in range(watch.num_layers):
        watch._count(layer, router)


def _ns(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - started) / CALLS


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_new(Path(name), MoEShape())
        found = on_ranks(measure, Path(name), args.rounds, world_size=1)
    times = {name: summary(each) for name, each in found.pop("times").items()}
    step = times["step"]["median_ms"]
    ratios = {
        "timed_vs_not": times["step timed"]["median_ms"] / step,
        "count": times["count"]["median_ms"] / step,
        "marks": found["marks"] * found["mark_ns"] * 1e-6 / step,
        "passed": found["marks"] * found["passed_ns"] * 1e-6 / step,
    }
    print_table("a step, and what is told of it", times, ratios)
    setting = {"rounds": args.rounds, "shape": vars(MoEShape()), "tokens": TOKENS}
    write_results(args.json, __doc__.splitlines()[0], setting, {"times": times, "ratios": ratios, **found})


if __name__ == "__main__":
    main()
