"""A small MoE that is trained in the run of a benchmark, so that its routing is that of a model and of text."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ranks import on_ranks
from ep_engine.c2r.collaboration import Profile
from ep_engine.c2r.profile import profile
from ep_engine.checkpoint import newest
from ep_engine.config import RunConfig, make_config
from ep_engine.data.tokens import TokenFile
from ep_engine.entries import Shard, expected_entries
from ep_engine.initial import initialise
from ep_engine.mesh import World
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.planning.routing_trace import save_trace
from ep_engine.quickstart import Progress, Sizes, make_text
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train
from ep_engine.whole_model import write_model

SEQUENCE = 512
VOCABULARY = 4096
PROFILE_TOKENS = 65_536
TRAINING_RANKS = 2


@dataclass(frozen=True)
class MoEShape:
    """What the model is: D 512, 4 layers, E 64, k 6 unless told otherwise."""

    hidden: int = 512
    layers: int = 4
    heads: int = 8
    experts: int = 64
    top_k: int = 6
    width: int = 128

    def config(self) -> ModelConfig:
        """A decoder with experts in every layer."""
        moe = MoEConfig(num_experts=self.experts, top_k=self.top_k, expert_hidden_size=self.width, gate="linear")
        return ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            intermediate_size=self.width * self.top_k,
            max_position_embeddings=SEQUENCE,
            moe=moe,
        )


def run_config(folder: Path, name: str, rows: int, **sections: dict[str, Any]) -> RunConfig:
    """A run on the text of `folder` with `rows` rows of SEQUENCE tokens in a batch."""
    data = {"train": str(folder / "text/train"), "sequence_length": SEQUENCE, "batch_size": rows}
    raw = {**sections, "data": data, "output": {"folder": str(folder / name)}}
    return make_config(raw, f"the benchmark's run {name}")


def make_new(folder: Path, shape: MoEShape) -> None:
    """Text of this Python's standard library in folder/text, and a model with random weights in folder/new."""
    make_text(folder, Sizes(vocab_size=VOCABULARY), Progress())
    model = shape.config()
    weights = {name: torch.empty(size) for name, size in expected_entries(model).items()}
    initialise({name: Shard(weight, weight, 0) for name, weight in weights.items()}, model, seed=0)
    write_model(folder / "new", model, weights)


def train_moe(folder: Path, shape: MoEShape, steps: int) -> tuple[Path, Profile]:
    """Train a new model on two ranks here, and profile it; the checkpoint and its profile, in profile.npz too.

    The trace of the profile's text is in trace.npz.
    """
    make_new(folder, shape)
    config = run_config(
        folder,
        "trained",
        rows=4 * TRAINING_RANKS,
        model={"checkpoint": str(folder / "new")},
        train={"steps": steps, "learning_rate": 1e-3},
        parallel={"expert_parallel_size": TRAINING_RANKS},
    )
    started = time.perf_counter()
    loss = on_ranks(_train, config, world_size=TRAINING_RANKS)["loss"]
    Progress().done(f"trained {steps} steps in {time.perf_counter() - started:.0f} s, last loss {loss:.3f}")
    checkpoint = newest(folder / "trained")
    assert checkpoint is not None, "a run that ends well has written one"
    text = TokenFile(folder / "text/train", vocab_size=VOCABULARY)
    found = profile(
        checkpoint, text, max_tokens=PROFILE_TOKENS, sequence_length=SEQUENCE, keep_ids=True, keep_scores=True
    )
    counted = found.profile
    counted.save(folder / "profile.npz")
    assert found.ids_LTK is not None, "they were kept"
    save_trace(folder / "trace.npz", found.ids_LTK, found.scores_LTE)
    return checkpoint, counted


def _train(rank: int, config: RunConfig) -> dict[str, Any]:
    size = dist.get_world_size()
    run = resolve(config, size)
    dist.barrier()  # no rank may make the run folder before all have seen that it is free
    last: dict[str, Any] = {}
    train(run, World(rank=rank, size=size), last.update)
    return last
