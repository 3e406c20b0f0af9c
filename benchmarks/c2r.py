"""What do placement and constraints save, and what do they cost in loss, from one checkpoint and on the same data?

    python -m benchmarks.c2r [--steps 100] [--seeds 3] [--train-steps 300] [--json OUT] [--picture OUT.png]

A MoE (D 128, 4 layers, E 32, k 4, F 64, 4096 tokens a step) is trained first, on the text of this Python's standard
library, then profiled and placed on 4 devices. Every arm goes on from its weights for the same steps on the same
batches, on 4 ranks that hold a quarter of the experts each; a seed is an order of the batches.

    plain            one row per copy
    dedup            one row per token and device
    placed           and experts where `ep-engine place` puts them
    group_limited M  experts of at most M groups with consecutive ids: what others have
    c2r T            placed, and partners only among the T closest collaborators of the top-1 expert
    grouped M        placed, and on at most M devices: c2r_grouped, T 16

`loss` is that on held-out text under the arm's own rule, nats; `bytes` left a rank per token and step; `changed` is the
share of held-out tokens whose experts are not those of plain top-k. Beside them: how local the base model is at all,
how a placement solved on training text does on held-out text, and how many tokens a profile needs.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import on_ranks
from benchmarks.timing import write_results
from benchmarks.trained_moe import SEQUENCE, VOCABULARY, MoEShape, run_config, train_moe
from ep_engine.c2r.locality import Counted, describe_layer, uniform_layer
from ep_engine.c2r.place import place
from ep_engine.c2r.profile import Profiled, profile
from ep_engine.config import RunConfig
from ep_engine.data.tokens import TokenFile
from ep_engine.mesh import World
from ep_engine.placement import Placement
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train

mpl.use("agg")
import matplotlib.pyplot as plt

SHAPE = MoEShape(hidden=128, layers=4, heads=4, experts=32, top_k=4, width=64)
DEVICES = 4
ROWS = 8
TOP_T = (4, 8, 16)
GROUPED_T = 16
TOKENS = 131_072  # of a profile
Arms = dict[str, dict[str, dict[str, Any]]]


def arms_of(folder: Path) -> Arms:
    """What each arm has in its run file."""
    placed = {"placement": str(folder / "placed.json")}
    lists = {"profile": str(folder / "profile.npz")}
    limited = {"rule": "group_limited", "num_groups": DEVICES}
    grouped = {"rule": "c2r_grouped", "top_t": GROUPED_T, **lists}
    return {
        "plain": {"moe": {"combine": "per_expert"}},
        "dedup": {},
        "placed": {"moe": placed},
        **{f"group_limited {m}": {"routing": {**limited, "max_devices": m}} for m in (1, 2)},
        **{f"c2r {t}": {"moe": placed, "routing": {"rule": "c2r", "top_t": t, **lists}} for t in TOP_T},
        **{f"grouped {m}": {"moe": placed, "routing": {**grouped, "max_devices": m}} for m in (1, 2)},
    }


def locality(folder: Path, checkpoint: Path) -> tuple[Placement, dict[str, Any]]:
    """Profile both texts and place by the first; what the placement is worth on either, and on uniform routing."""
    found: dict[str, Profiled] = {}
    for name in ("train", "heldout"):
        text = TokenFile(folder / "text" / name, vocab_size=VOCABULARY)
        found[name] = profile(checkpoint, text, max_tokens=TOKENS, sequence_length=SEQUENCE, keep_ids=True)
    solved_on = found["train"]
    solved_on.profile.save(folder / "profile.npz")
    placement, _ = place(solved_on.profile, DEVICES, objective="distinct-devices", ids_LTK=solved_on.ids_LTK)
    placement.save(folder / "placed.json")
    contiguous = Placement.contiguous(SHAPE.experts, DEVICES, SHAPE.layers)
    report: dict[str, Any] = {"uniform": uniform_layer(SHAPE.experts, SHAPE.top_k, DEVICES)}
    for text, run in found.items():
        for name, one in (("placed", placement), ("contiguous", contiguous)):
            report[f"{name} on {text}"] = _means(run, one)
    gained = report["placed on heldout"]["intra_device_fraction"] - report["uniform"]["intra_device_fraction"]
    report["says"] = (
        "the base model has locality beyond uniform routing, on text that the placement was not solved for"
        if gained > 0.02
        else "the base model has no more locality than uniform routing: this shows nothing about real models"
    )
    report["halves"] = solved_on.halves
    return placement, report


def _means(run: Profiled, placement: Placement) -> dict[str, float]:
    counted = run.profile
    assert run.ids_LTK is not None, "they were kept"
    layers = [
        describe_layer(
            Counted(counted.counts[n], counted.load[n], counted.top_k, run.ids_LTK[n]),
            placement.device_of_expert(n),
            DEVICES,
        )
        for n in range(counted.num_layers)
    ]
    return {key: statistics.fmean(layer[key] for layer in layers) for key in layers[0]}


def run_arm(
    folder: Path, name: str, sections: dict[str, Any], checkpoint: Path, steps: int, seed: int
) -> dict[str, Any]:
    """Go on with training under the rule of an arm; the figures of its summary."""
    config = run_config(
        folder,
        f"{name.replace(' ', '-')}-{seed}",
        rows=ROWS,
        **sections,
        model={"checkpoint": str(checkpoint)},
        train={
            "steps": steps,
            "seed": seed,
            "learning_rate": 5e-4,
            "min_learning_rate": 5e-5,
            "warmup_steps": 5,
            "log_every": max(steps // 10, 1),
        },
        parallel={"expert_parallel_size": DEVICES},
    )
    heldout = {"heldout": folder / "text/heldout", "heldout_batches": 8}
    config = config.model_copy(update={"data": config.data.model_copy(update=heldout)})
    summary = on_ranks(_train, config, world_size=DEVICES)
    tiers = {"node": 0.0, "network": 0.0}
    for layer in summary["ledger"]["layers"]:
        for of_tiers in layer["bytes"].values():
            for tier in tiers:
                tiers[tier] += of_tiers[tier] / layer["tokens"]
    return {
        "loss": summary["heldout_loss"],
        "bytes": sum(tiers.values()),
        "bytes_by_tier": tiers,
        "devices": summary["ledger"]["devices_per_token"],
        "expert_load": summary["load_max_over_mean"],
        "device_load": summary["device_load_max_over_mean"],
        "changed": summary["changed_share"],
        "step_ms": ROWS * SEQUENCE / summary["tokens_per_second"] * 1e3,
    }


def _train(rank: int, config: RunConfig) -> dict[str, Any]:
    run = resolve(config, DEVICES)
    dist.barrier()  # no rank may make the run folder before all have seen that it is free
    return train(run, World(rank=rank, size=DEVICES))


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and of the loss the least and the largest too."""
    merged = {key: statistics.fmean(run[key] for run in runs) for key in runs[0] if key != "bytes_by_tier"}
    merged["bytes_by_tier"] = {
        tier: statistics.fmean(run["bytes_by_tier"][tier] for run in runs) for tier in runs[0]["bytes_by_tier"]
    }
    losses = [run["loss"] for run in runs]
    return merged | {"losses": losses, "loss_min": min(losses), "loss_max": max(losses)}


def verdicts(arms: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of every arm: what it saves beside `placed`, and whether its loss can be told from it, seed by seed."""
    base = arms["placed"]
    found = {}
    for name, arm in arms.items():
        if name in ("plain", "dedup", "placed"):
            continue
        saved = 1 - arm["bytes"] / base["bytes"]
        differences = [one - other for one, other in zip(arm["losses"], base["losses"], strict=True)]
        same_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
        told = f"costs {statistics.fmean(differences):+.4f} nats" if same_sign and len(differences) > 1 else (
            "its loss is not distinguishable"
        )  # fmt: skip
        pays = "" if saved > 0.01 else ": it does not pay"
        found[name] = f"{told}, {saved:.0%} fewer bytes than placement alone{pays}"
    return found


def draw(path: Path, arms: dict[str, dict[str, Any]]) -> None:
    """Loss against bytes, a bar from the least to the largest seed."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for name, arm in arms.items():
        below, above = arm["loss"] - arm["loss_min"], arm["loss_max"] - arm["loss"]
        axis.errorbar(arm["bytes"] / 1e3, arm["loss"], yerr=[[below], [above]], marker="o", capsize=3, label=name)
    axis.set(xlabel="kB that left a rank per token", ylabel="held-out loss, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(arms: dict[str, dict[str, Any]]) -> None:
    """The table of the arms."""
    columns = ("loss", "least", "largest", "bytes", "devices", "expert load", "device load", "changed", "step ms")
    table = Table("", *columns)
    for name, arm in arms.items():
        losses = (f"{arm[key]:.4f}" for key in ("loss", "loss_min", "loss_max"))
        rest = (f"{arm[key]:.3f}" for key in ("devices", "expert_load", "device_load", "changed"))
        table.add_row(name, *losses, f"{arm['bytes']:.0f}", *rest, f"{arm['step_ms']:.0f}")
    Console(stderr=True, width=120).print(table)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, _ = train_moe(folder, SHAPE, args.train_steps)
        _, local = locality(folder, checkpoint)
        arms: dict[str, dict[str, Any]] = {}
        for arm, sections in arms_of(folder).items():
            runs = [run_arm(folder, arm, sections, checkpoint, args.steps, seed) for seed in range(args.seeds)]
            arms[arm] = over_seeds(runs)
            Console(stderr=True).print(f"{arm}: loss {arms[arm]['loss']:.4f}, {arms[arm]['bytes']:.0f} bytes per token")
    show(arms)
    if args.picture is not None:
        draw(args.picture, arms)
    setting = {"shape": vars(SHAPE), "devices": DEVICES, "tokens a step": ROWS * SEQUENCE}
    setting |= {name: value for name, value in vars(args).items() if name not in ("json", "picture")}
    results = {"arms": arms, "locality": local, "verdicts": verdicts(arms)}
    write_results(args.json, __doc__.splitlines()[0], setting, results)


if __name__ == "__main__":
    main()
