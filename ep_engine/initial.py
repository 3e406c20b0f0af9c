"""Weights of a new model: each entry from a random stream of its own, so that they do not depend on the layout."""

import hashlib
from collections.abc import Mapping

import torch

from ep_engine.entries import Shard, expected_entries
from ep_engine.model_config import ModelConfig


def initialise(entries: Mapping[str, Shard], config: ModelConfig, seed: int) -> None:
    """Fill a model's entries in place: norms with 1; biases, a gate's temperature and noise with 0; learned factors
    with what they start from; the rest from N(0, initializer_range^2).

    Args:
        entries: what this rank holds, from `entries.module_entries`.
        config: the model; `expected_entries` gives the shape of each entry.
        seed: of all streams.
    """
    shapes = expected_entries(config)
    for name, shard in entries.items():
        if name.endswith("norm.weight"):
            shard.tensor.fill_(1.0)
        elif name.endswith((".bias", ".b_in", ".temperature", ".w_noise")):
            shard.tensor.zero_()
        elif name.endswith(".router.scale"):
            assert config.moe is not None, "it has routers"
            shard.tensor.fill_(config.moe.scale_of(config.moe_index(int(name.split(".")[1]))))
        else:
            # Drawn whole: the part of a rank is the same whatever the other parts are.
            whole = torch.randn(shapes[name], generator=_stream(seed, name)) * config.initializer_range
            part = shard.tensor
            strides = part.stride() if shard.pitch is None else (shard.pitch, 1)
            part.copy_(whole.as_strided(part.shape, strides, shard.first) if part.numel() else part)


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
