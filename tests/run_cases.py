"""Small runs for tests: token files drawn from a seed, small models, and training on ranks that a test has started."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ep_engine.config import RunConfig, make_config
from ep_engine.data.tokens import write_token_file
from ep_engine.mesh import World
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train
from tests.counts import random_profile
from tests.small_models import SIZES, dense_folder, moe_checkpoint

VOCAB = SIZES["vocab_size"]
NEW_MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
}


def write_text(folder: Path, *, num_tokens: int = 4000) -> Path:
    """Token files `train` and `heldout`: a walk in which the next token is near the last, so there is much to learn."""
    for name, seed in (("train", 0), ("heldout", 1)):
        steps = np.random.default_rng(seed).integers(-2, 4, num_tokens)
        write_token_file(folder / name, [np.cumsum(steps) % VOCAB], VOCAB)
    return folder


def moe_model(folder: Path) -> Path:
    """An engine checkpoint with 8 experts, top-2."""
    return moe_checkpoint(folder / "moe", dense_folder(folder / "dense", initializer_range=0.05))


def moe_folder(folder: Path) -> Path:
    """Token files, a MoE model of 2 layers and 8 experts in `moe`, and counts for it in `profile.npz`."""
    write_text(folder)
    moe_model(folder)
    random_profile(2, 8, seed=0).save(folder / "profile.npz")
    return folder


def small_run(folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """The configuration of a run of a few steps into `folder / name`."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {} if "checkpoint" in sections.get("model", {}) else NEW_MODEL,
        "data": {
            "train": str(folder / "train"),
            "heldout": str(folder / "heldout"),
            "sequence_length": 16,
            "batch_size": 8,
            "heldout_batches": 2,
        },
        "train": {"steps": 6, "warmup_steps": 2, "learning_rate": 3e-3, "log_every": 2},
        "output": {"folder": str(folder / name)},
    }
    names = [*defaults, *(name for name in sections if name not in defaults)]
    return make_config({name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}, "a test")


def train_here(config: RunConfig, rank: int = 0, world_size: int = 1, *, overwrite: bool = False) -> dict[str, Any]:
    """Resolve and train on a rank of `run_ranks`, or in this process."""
    run = resolve(config, world_size, overwrite=overwrite)
    if dist.is_initialized():
        dist.barrier()  # no rank may make the run folder before all have seen that it is free
    return train(run, World(rank=rank, size=world_size))


def losses(config: RunConfig) -> list[float]:
    """The loss of every step."""
    lines = (config.output.folder / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]
