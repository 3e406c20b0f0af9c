"""Runs of training inside benchmarks, as `ranks.on_ranks` starts them."""

from typing import Any

import torch.distributed as dist

from ep_engine.config import RunConfig
from ep_engine.mesh import World
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train


def train_rank(rank: int, config: RunConfig) -> dict[str, Any]:
    """One rank of a run, into a folder in which an ended benchmark may have left one half done; its summary."""
    size = dist.get_world_size()
    run = resolve(config, size, overwrite=True)
    dist.barrier()  # no rank may make the run folder before all have seen that it is free
    return train(run, World(rank=rank, size=size))
