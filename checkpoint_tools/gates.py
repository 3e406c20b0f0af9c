"""Router weights of new MoE layers.

Shapes: E experts, D model dim, R width inside the gate.
"""

import numpy as np
import torch
from torch import Tensor

from ep_engine.model_config import ModelConfig, MoEConfig

# Streams of random numbers of their own: partitions of neurons do not depend on gates.
_GATE, _RESIDUAL_GATE = 1, 4


def new_gate(config: ModelConfig, moe: MoEConfig, seed: int, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices from N(0, initializer_range^2), as in LLaMA-MoE v1; biases, temperature and noise 0."""
    e, d, inside = moe.num_experts, config.hidden_size, moe.gate_hidden_size or moe.num_experts
    random = np.random.default_rng([seed, _GATE, layer])

    def drawn(*shape: int) -> Tensor:
        draw = random.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(draw * np.float32(config.initializer_range)).to(dtype)

    gate = {"w_in": drawn(inside, d)}
    if moe.gate != "linear":
        gate["w_out"] = drawn(e, inside)
    if moe.gate == "mlp_gelu":
        gate["b_in"] = torch.zeros(inside, dtype=dtype)
    if moe.gate == "cosine":
        gate["temperature"] = torch.zeros(1, dtype=dtype)
    if moe.gate_noise:
        gate["w_noise"] = torch.zeros(e, d, dtype=dtype)
    return gate


def new_residual_gate(config: ModelConfig, moe: MoEConfig, seed: int, layer: int, dtype: torch.dtype) -> Tensor:
    """(r, D) from N(0, initializer_range^2)."""
    random = np.random.default_rng([seed, _RESIDUAL_GATE, layer])
    draw = random.standard_normal((moe.residual_experts, config.hidden_size), dtype=np.float32)
    return torch.from_numpy(draw * np.float32(config.initializer_range)).to(dtype)


def mean_directions(experts: list[Tensor]) -> Tensor:
    """(E, D): the mean of the rows of each expert, each of length one; a token is near to neurons it would excite.

    LLaMA-MoE's `weight` initialisation of a gate, which has the identity as its second matrix.
    """
    return torch.stack([torch.nn.functional.normalize(rows.float(), dim=1).mean(dim=0) for rows in experts])


def in_groups(gate: dict[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """The same with equal rows, hence equal logits, for as many experts that follow each other.

    The rows of the first 1 / group_size of the experts are repeated (virtual groups, arXiv:2410.07524).
    """
    last = "w_out" if "w_out" in gate else "w_in"  # whose rows are the logits'
    rows = gate[last]
    return {**gate, last: rows[: len(rows) // group_size].repeat_interleave(group_size, dim=0)}
