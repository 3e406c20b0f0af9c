"""What a MoE layer must compute, in the plainest form: one rank, loops, no permutation. Imports nothing of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, w_gate_FD: Tensor, w_up_FD: Tensor, w_down_DF: Tensor) -> Tensor:
    """One expert: w_down (silu(w_gate x) * (w_up x)), arXiv:2002.05202 eq. 6."""
    return F.linear(F.silu(F.linear(x, w_gate_FD)) * F.linear(x, w_up_FD), w_down_DF)


def moe_forward(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_gate_EFD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]); differentiable in everything but the ids."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(w_gate_EFD.shape[0]):
        weight_T1 = (weights_TK * (ids_TK == e)).sum(dim=1, keepdim=True)
        out_TD = out_TD + weight_T1 * swiglu(x_TD, w_gate_EFD[e], w_up_EFD[e], w_down_EDF[e])
    return out_TD


def tree_sum(values: list[tuple[int, Tensor]], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Sum (leaf, value) pairs along a tree: every group sums its children in float32 and rounds to `dtype`.

    Args:
        values: leaves ascending, values float32.
        sizes: leaves of a group at each level, innermost first; the last level is one group.
        dtype: what every group's sum is rounded to.
    """
    for size in sizes:
        groups: dict[int, Tensor] = {}
        for leaf, value in values:
            group = leaf // size * size
            groups[group] = groups[group] + value if group in groups else value
        values = [(group, total.to(dtype).float()) for group, total in groups.items()]
    (_, total), *others = values
    assert not others, "the last level must be one group"
    return total.to(dtype)


def count_pairs(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Co-activation counts (E, E) int64: tokens that chose both experts; on the diagonal, tokens that chose the one."""
    counts = torch.zeros(num_experts, num_experts, dtype=torch.int64)
    for ids in ids_TK.tolist():
        for i in ids:
            for j in ids:
                counts[i, j] += 1
    return counts
