"""What does watching the routers cost of a training step?

    python -m benchmarks.watch [--rounds 9] [--json OUT]

A MoE (D 512, 4 layers, E 64, k 6, 2048 tokens, float32) on one process with all threads. A call is ten steps and the
line of metrics after them, with co-activation counted (`on`) and without (`off`); the two take turns. `look` is what a
save adds on every rank: the counts since the last one; the solver that then compares the placement has a thread of the
lowest priority, and is timed by itself.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import Together, all_times, on_ranks, summary
from benchmarks.timing import print_table, write_results
from benchmarks.trained_moe import MoEShape, make_new, run_config
from ep_engine.mesh import World, process_groups
from ep_engine.placement import Placement
from ep_engine.placement_watch import compare
from ep_engine.resolve import resolve
from ep_engine.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 10
DEVICES = 8


def measure(_: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Times of both, and of a look."""
    with process_groups(World(), CPU, 1, 300.0) as meshes:
        calls = {}
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
            trainer = trainers[name] = Trainer(resolve(config.model_copy(update={"output": output}), 1), meshes, CPU)
            calls[name] = Together(lambda trainer=trainer: _ten_steps(trainer), threads=os.cpu_count() or 1)
        times = all_times(calls, rounds=rounds, warm_up=1)
        routing = trainers["on"].routing
        assert routing is not None, "the model has experts"
        started = time.perf_counter()
        recent = routing.recent({})
        look_ms = (time.perf_counter() - started) * 1e3
        assert recent is not None, "it is counted"
        started = time.perf_counter()
        compare(Placement.contiguous(recent.num_experts, DEVICES, recent.num_layers), recent, 0, None)
        return {"times": times, "look_ms": look_ms, "solver_ms": (time.perf_counter() - started) * 1e3}


def _ten_steps(trainer: Trainer) -> None:
    for _ in range(STEPS):
        trainer.one_step()
    assert trainer.routing is not None, "the model has experts"
    trainer.routing.line()


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_new(folder, MoEShape())
        found = on_ranks(measure, folder, args.rounds, world_size=1)
    pairs = [on / off - 1 for on, off in zip(found["times"]["on"], found["times"]["off"], strict=True)]
    times = {name: summary(of) for name, of in found["times"].items()}
    ratios = {"on_vs_off": times["on"]["median_ms"] / times["off"]["median_ms"]}
    result = {"times": times, "ratios": ratios, "pairs": pairs, "look_ms": found["look_ms"]}
    result["solver_ms"] = found["solver_ms"]
    print_table("ten steps and a line", times, ratios)
    setting = {"rounds": args.rounds, "shape": vars(MoEShape()), "tokens": 4 * 512}
    write_results(args.json, __doc__.splitlines()[0], setting, {"watch": result})


if __name__ == "__main__":
    main()
