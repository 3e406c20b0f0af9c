"""MFU: the operations that a model needs for its tokens, as a share of what its devices could do (arXiv:2204.02311 B).

Needed are those of the weights that a token meets, its top_k experts and not all of them, and of attention to what is
before it; nothing that is computed again, no padding, and no documents that are kept apart.
"""

import time
from functools import cache
from typing import NamedTuple

import torch

from ep_engine.model_config import ModelConfig

# Published tera operations per second without sparsity: float32 outside of tensor cores, bfloat16 in them.
_PUBLISHED = {
    "A100": (19.5, 312.0),
    "H100 PCIe": (51.0, 756.0),
    "H100 80GB HBM3": (67.0, 989.0),
    "H200": (67.0, 989.0),
}
_SIDE = 1024  # of the matrices that are multiplied
_SECONDS = 0.1  # for which they are


class Peak(NamedTuple):
    """What one rank's device can do."""

    tflops: float
    source: str


def activated_parameters(model: ModelConfig) -> int:
    """Weights that a token is multiplied with: K of a layer's experts, all else whole, the head, not the embedding."""
    d = model.hidden_size
    total = d * model.vocab_size
    for layer in range(model.num_layers):
        total += 2 * d * (model.num_heads + model.num_kv_heads) * model.head_dim
        moe = model.moe_of(layer)
        if moe is None:
            total += 3 * d * model.dense_size(layer)
            continue
        inside = moe.gate_hidden_size or moe.num_experts
        total += d * inside + (0 if moe.gate == "linear" else inside * moe.num_experts)
        total += 3 * d * (moe.top_k * moe.expert_hidden_size + moe.beside_hidden_size)
        total += d * (moe.residual_experts + 2 * moe.residual_weighting + moe.shared_gate)
    return total


def flops_of_token(model: ModelConfig, sequence_length: int) -> float:
    """Operations of a token's forward and backward: 6 for a weight, and 12 for each of a head's channels and each
    position that it sees, of which there are half as many as in the sequence, or as a window leaves.
    """
    window = min(model.sliding_window or sequence_length, sequence_length)
    seen = window - window**2 / (2 * sequence_length)
    return 6.0 * activated_parameters(model) + 12 * seen * model.num_layers * model.num_heads * model.head_dim


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published rate of a GPU that is in the table; else the best that a matrix product reaches here and now.

    On CPU that is the rate of this process with its threads, while other ranks may use the same cores.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, rates in _PUBLISHED.items():
            if known in name:
                return Peak(rates[dtype != torch.float32], f"published for {name}, {_name(dtype)}")
    return _measured(device, dtype, torch.get_num_threads())


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Peak:
    a, b = torch.ones(2, _SIDE, _SIDE, dtype=dtype, device=device)
    best, began, done = float("inf"), time.perf_counter(), 0
    while done < 3 or time.perf_counter() - began < _SECONDS:
        before = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, done = min(best, time.perf_counter() - before), done + 1
    on = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Peak(2e-12 * _SIDE**3 / best, f"measured product of {_SIDE} x {_SIDE}, {_name(dtype)}, {on}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
