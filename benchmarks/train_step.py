"""How fast is a whole training step, and what does it need, beside transformers with the same optimiser?

    python -m benchmarks.train_step [--turns 3] [--steps 6] [--json OUT]

A model like Qwen1.5-MoE-A2.7B (60 experts of which 4, a shared expert with a gate) at a quarter of its widths, float32,
one process with all cores: forward, loss, backward, clipping, fused AdamW, on the same tokens, from the same weights;
the losses of the first steps are compared. Every contender runs in a process of its own, because its peak memory
(resident set) is asked for; processes take turns, so that a machine that slows down meets all. Our process is what
`ep-engine train` runs on one rank. Peak memory is given in all, and above what the imports need.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.qwen2_moe import engine_views, model_config
from benchmarks.ranks import summary
from benchmarks.timing import print_table, write_results
from ep_engine.config import TrainSection
from ep_engine.data.batches import Batch
from ep_engine.entries import Shard
from ep_engine.entropy import entropy_sum
from ep_engine.initial import initialise
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.parallelize import build, entries_of
from ep_engine.pipeline import Pipeline
from ep_engine.placement import Placement
from ep_engine.stages import Stages
from ep_engine.training.optimizer import clip_gradients, make_optimizer, sum_over_ranks

CPU = torch.device("cpu")
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 352,
    "shared_expert_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "qkv_bias": False,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
ROWS, LENGTH = 8, 512
TRAIN = TrainSection(steps=100, learning_rate=1e-3)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
OURS = {"ours": "none", "ours, selective": "selective", "ours, full": "full"}  # and what is computed again
COMPARED = 3  # steps whose losses must agree
Step = Callable[[Batch], float]


def batch_of(step: int) -> Batch:
    """Random tokens, the same for all."""
    rows = torch.randint(0, CONFIG["vocab_size"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros(ROWS, LENGTH, dtype=torch.int64))


def our_step(recompute: str, meshes: Meshes) -> Step:
    """A step of the engine."""
    config = model_config(Qwen2MoeConfig(**CONFIG))
    placement = Placement.contiguous(CONFIG["num_experts"], 1, config.num_layers)
    models, _ = build(config, placement, meshes, device=CPU, dtype=torch.float32)
    initialise(entries_of(models), config, seed=0)
    models[0].recompute(recompute)  # type: ignore[arg-type]
    pipeline = Pipeline(
        models,
        Stages.of(config.num_layers, 1, "1f1b"),
        meshes,
        "1f1b",
        part_shape=(ROWS, LENGTH),
        num_parts=1,
        dtype=torch.float32,
        separate_documents=False,
        loss=lambda logits, targets: entropy_sum(logits, targets) / (ROWS * LENGTH),
    )
    optimizer = make_optimizer(models, TRAIN)

    def step(batch: Batch) -> float:
        loss, norm, _ = sum_over_ranks(pipeline.train([batch]), models, meshes.world)
        clip_gradients(models, norm, TRAIN.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def their_step(implementation: str) -> Step:
    """A step of transformers with torch's fused AdamW."""
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**CONFIG, experts_implementation=implementation))
    model = model.to_empty(device=CPU)
    for module in model.modules():  # buffers that are computed and not stored
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(model.config).inv_freq
    initialise(
        {name: Shard(view, view, 0) for name, view in engine_views(model).items()}, model_config(model.config), 0
    )
    assert model.config._experts_implementation == implementation
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": TRAIN.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=TRAIN.learning_rate,
        betas=(TRAIN.beta1, TRAIN.beta2),
        fused=True,
    )

    def step(batch: Batch) -> float:
        logits = model(batch.inputs_BS, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def run_alone(name: str, steps: int) -> dict[str, Any]:
    """One contender in this process: losses, milliseconds of its steps after the first two, peak memory."""
    imported = _peak_bytes()
    losses, times = [], []
    with ExitStack() as stack:
        if name in OURS:
            meshes = stack.enter_context(process_groups(World(), CPU, 1, 60.0))
            step = our_step(OURS[name], meshes)
        else:
            step = their_step(name.split()[-1])
        for number in range(COMPARED + steps):
            batch = batch_of(number)
            started = time.perf_counter()
            losses.append(step(batch))
            times.append((time.perf_counter() - started) * 1e3)
    return {"losses": losses, "times_ms": times[COMPARED:], "peak": _peak_bytes(), "imported": imported}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(turns: int, steps: int) -> dict[str, Any]:
    """All contenders in turn."""
    contenders = [*OURS, *(f"transformers {name}" for name in IMPLEMENTATIONS)]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, dict[str, int]] = {}
    left_out = []
    for _ in range(turns):
        for name in list(times):
            line = [sys.executable, "-m", "benchmarks.train_step", "--alone", name, "--steps", str(steps)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                left_out.append(f"{name}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}")
                del times[name]
                continue
            answer = json.loads(done.stdout.splitlines()[-1])
            times[name] += answer["times_ms"]
            above = answer["peak"] - answer["imported"]
            memory[name] = {"peak": answer["peak"], "peak_above_imports": above}
            expected = answer["losses"] if name == "ours" else expected  # noqa: F821  # ours is the first
            for ours, theirs in zip(expected[:COMPARED], answer["losses"], strict=False):
                assert abs(ours - theirs) < 1e-4 * ours, f"{name}: losses {answer['losses']}, ours {expected}"
    found = {name: summary(ms) for name, ms in times.items()}
    return {"times": found, "memory": memory, "left_out": left_out, "ratios": _ratios(found, memory)}


def _ratios(times: dict[str, dict[str, float]], memory: dict[str, dict[str, int]]) -> dict[str, float]:
    """`vs_transformers` above 1 where we are faster, memory below 1 where we need less."""
    ms = {name: found["median_ms"] for name, found in times.items()}
    best = min((name for name in ms if name.startswith("transformers")), key=lambda name: ms[name])
    ratios = {}
    for name, recompute in OURS.items():
        suffix = "" if recompute == "none" else f"_{recompute}"
        ratios[f"vs_transformers{suffix}"] = ms[best] / ms[name]
        ratios[f"memory_vs_transformers{suffix}"] = memory[name]["peak"] / memory[best]["peak"]
        ours, theirs = (memory[which]["peak_above_imports"] for which in (name, best))
        ratios[f"memory_above_imports_vs_transformers{suffix}"] = ours / theirs
    return ratios


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are timed in a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run_alone(args.alone, args.steps)))  # noqa: T201
        return
    found = compare(args.turns, args.steps)
    print_table("training step", found["times"], found["ratios"])
    setting = {**CONFIG, "rows": ROWS, "length": LENGTH, "turns": args.turns, "steps": args.steps, "dtype": "float32"}
    write_results(args.json, __doc__.splitlines()[0], setting, found)


if __name__ == "__main__":
    main()
