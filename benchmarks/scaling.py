"""What does each kind of parallelism cost on 1 to 8 ranks here, and what is foretold of 8 to 4096 GPUs?

    python -m benchmarks.scaling [--ranks 1 2 4 8] [--gpus 8 64 512 4096] [--rounds 5] [--json OUT]

Measured: a step of one batch of 8 rows of 512 tokens, whatever the number of ranks, by one process with two threads and
by ranks that share its two cores: nothing can become faster here, so what is told is the *overhead*, the time of a step
over that of one process that does the same work (for pp: with as many parts of the batch). Memory is the largest
resident set of a rank. Bytes left a rank in a step: those of experts from the ledger, the others as `plan` counts them.

Modelled, and measured nowhere: a step of a model of 16 billion parameters on GPUs (see MODEL), EP over at most 64 of
them, data-parallel beyond, uniform routing, by `ep-engine simulate` on launch/clusters/h200-ib.toml.
"""

import argparse
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import Together, all_times, on_ranks, summary
from benchmarks.timing import write_results
from benchmarks.trained_moe import MoEShape, make_new, run_config
from ep_engine.config import RunConfig, make_config
from ep_engine.mesh import World, process_groups
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.planning.cluster import read_cluster
from ep_engine.planning.plan_run import plan_run
from ep_engine.planning.routing_trace import DRAWN, draw_routing, save_trace
from ep_engine.planning.simulate import simulate
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer

SHAPE = MoEShape(hidden=256, layers=8)
ROWS = 8
SIZE_KEYS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "ep": "expert_parallel_size",
    "dp": "data_parallel_size",
}
TOKENS = 4 * 4096  # of a GPU in a step
CLUSTER = Path(__file__).resolve().parent.parent / "launch/clusters/h200-ib.toml"
MODEL = ModelConfig(
    vocab_size=102_400,
    hidden_size=2048,
    num_layers=28,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    intermediate_size=1408 * 8,
    max_position_embeddings=4096,
    moe=MoEConfig(num_experts=64, top_k=6, expert_hidden_size=1408, gate="linear", shared_hidden_size=2 * 1408),
)


def measure(rank: int, config: RunConfig, rounds: int) -> dict[str, Any]:
    """Times of a step, memory and bytes of the rank that has most."""
    world = World(rank=rank, size=dist.get_world_size(), local_rank=rank, local_size=dist.get_world_size())
    parallel = config.parallel
    groups = process_groups(
        world,
        torch.device("cpu"),
        parallel.expert_parallel_size,
        300.0,
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )
    with groups as meshes:
        trainer = Trainer(resolve(config, world.size), meshes, torch.device("cpu"))
        threads = 2 if world.size == 1 else 1
        times = all_times({"step": Together(trainer.one_step, threads=threads)}, rounds=rounds, warm_up=2)["step"]
        trainer.ledger.reset()
        trainer.one_step()
        rows = sum(n for (_, _, tier), n in trainer.ledger.sent.items() if tier != "self")
        most = torch.tensor([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return {**summary(times), "rows_bytes": most[0].item(), "peak_bytes": most[1].item()}


def run_of(folder: Path, kind: str, ranks: int, parts: int) -> RunConfig:
    """One batch over ranks of one kind."""
    parallel = {} if ranks == 1 else {SIZE_KEYS[kind]: ranks}
    return run_config(
        folder,
        "scaling",
        rows=ROWS,
        model={"checkpoint": str(folder / "new")},
        train={"steps": 1000, "learning_rate": 1e-4, "min_learning_rate": 1e-4, "micro_batches": parts},
        parallel=parallel,
        moe={"transport": "auto"},
    )


def here(folder: Path, ranks: list[int], rounds: int) -> dict[str, Any]:
    """Every kind on every number of ranks."""
    found: dict[str, Any] = {}
    for kind in SIZE_KEYS:
        parts = ROWS if kind == "pp" else 1
        base = found.get("one process") if kind != "pp" else None
        for size in sorted({1, *ranks}):
            if size == 1 and base is not None:
                continue
            config = run_of(folder, kind, size, parts)
            one = on_ranks(measure, config, rounds, world_size=size)
            dense = plan_run(config, size)["traffic"]["dense_of_ranks"]
            one["dense_bytes"] = max(sum(sum(tiers.values()) for tiers in of.values()) for of in dense)
            if size == 1:
                base = one
            assert base is not None, "1 is the first"
            one["overhead"] = one["median_ms"] / base["median_ms"]
            one["tokens_per_second"] = ROWS * config.data.sequence_length / one["median_ms"] * 1e3
            name = f"{kind}{size}" if size > 1 else "one process" + (f", {parts} parts" if parts > 1 else "")
            found[name] = one
    return found


def on_gpus(folder: Path, gpus: int) -> dict[str, float]:
    """The modelled step."""
    (folder / "model.json").write_text(MODEL.model_dump_json())
    trace = folder / "uniform.npz"
    if not trace.exists():
        save_trace(trace, draw_routing(MODEL, DRAWN, seed=0).numpy())
    sequence = MODEL.max_position_embeddings
    raw: dict[str, Any] = {
        "model": {"checkpoint": str(folder)},
        "data": {"train": "text", "sequence_length": sequence, "batch_size": TOKENS // sequence * gpus},
        "train": {"steps": 1, "dtype": "bfloat16", "recompute": "selective"},
        "parallel": {"expert_parallel_size": min(gpus, 64), "device": "cuda"},
        "output": {"folder": str(folder / "run")},
    }
    cluster = read_cluster(CLUSTER)
    found = simulate(
        make_config(raw, "the benchmark's model"), cluster.changed(gpus // cluster.devices_per_node, None), trace
    )
    return {
        "ep": min(gpus, 64),
        "memory_gb": found["memory_gb"],
        **{f"{tier}_kb_a_token": num_bytes / 1e3 for tier, num_bytes in found["bytes_per_token"].items()},
        **{kind: found[kind] for kind in ("compute_ms", "rows_ms", "dense_ms")},
        "tokens_per_s": found["tokens_per_second"] / gpus,
    }


def show(measured: dict[str, Any], modelled: dict[str, Any]) -> None:
    """Both tables."""
    table = Table("", "ms", "least", "largest", "overhead", "tokens/s", "peak MB", "rows MB", "dense MB", title="Here")
    for name, one in measured.items():
        times = (f"{one[key]:.0f}" for key in ("median_ms", "min_ms", "max_ms"))
        megabytes = (f"{one[key] / 1e6:.1f}" for key in ("peak_bytes", "rows_bytes", "dense_bytes"))
        table.add_row(name, *times, f"{one['overhead']:.2f}", f"{one['tokens_per_second']:.0f}", *megabytes)
    console = Console(stderr=True)
    console.print(table)
    if modelled:
        columns = list(next(iter(modelled.values())))
        table = Table("GPUs", *(name.replace("_", " ") for name in columns), title="Modelled, not measured: of one GPU")
        for gpus, one in modelled.items():
            table.add_row(gpus, *(f"{one[name]:.4g}" for name in columns))
        console.print(table)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = {}
        if args.ranks:
            make_new(folder, SHAPE)
            measured = here(folder, args.ranks, args.rounds)
        modelled = {str(gpus): on_gpus(folder, gpus) for gpus in args.gpus}
    show(measured, modelled)
    setting = {
        "rounds": args.rounds,
        "measured": {"shape": vars(SHAPE), "rows": ROWS, "threads": "one process: 2; ranks: 1 each, on 2 cores"},
        "modelled": {"cluster": CLUSTER.name, "tokens": TOKENS, "model": MODEL.model_dump(mode="json")},
    }
    write_results(args.json, __doc__.splitlines()[0], setting, {"measured": measured, "modelled": modelled})


if __name__ == "__main__":
    main()
