"""What the ops of csrc/ must compute, in the plainest form: one rank, loops. Imports nothing of ours."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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


def select(
    scores: list[float],
    top_k: int,
    *,
    partners: list[list[int]] | None = None,
    top_t: int = 0,
    group_of: list[int] | None = None,
    max_groups: int = 0,
    group_top: int | None = None,
) -> list[int]:
    """Expert ids of one token: the selection rules of csrc/choose_experts.h, told plainly.

    Args:
        scores: [E], no NaN.
        top_k: K.
        partners: C2R: row i lists the other experts, closest collaborator of expert i first.
        top_t: T of C2R.
        group_of: [E] the device, or group, of every expert.
        max_groups: how many of them a token may use.
        group_top: group-limited: groups are ranked by the sum of their so many best scores.
    """
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    if partners is None and group_of is None:
        return order[:top_k]
    if partners is None:
        assert group_of is not None, "one of the two is there"
        best = {g: [scores[e] for e in order if group_of[e] == g][:group_top] for g in set(group_of)}
        open_groups = sorted(best, key=lambda g: (-sum(best[g]), g))[:max_groups]
        return [e for e in order if group_of[e] in open_groups][:top_k]
    row = partners[order[0]]
    candidates = row[:top_t]
    if group_of is not None:
        open_groups = list(dict.fromkeys(group_of[e] for e in order))[:max_groups]
        candidates = [e for e in row[:top_t] if group_of[e] in open_groups]
        further = [e for e in row[top_t:] if e != order[0] and group_of[e] in open_groups]
        candidates += further[: max(0, top_k - 1 - len(candidates))]
    return [order[0], *sorted(candidates, key=lambda e: (-scores[e], e))[: top_k - 1]]


def weigh(logits_TE: Tensor, ids_TK: Tensor, score: str, *, renormalise: bool, scale: float) -> Tensor:
    """Combine weights (T, K) of chosen experts; differentiable in the logits."""
    if score == "softmax_of_chosen":
        return scale * logits_TE.gather(1, ids_TK).softmax(dim=1)
    scores_TE = {"softmax": logits_TE.softmax(dim=1), "sigmoid": logits_TE.sigmoid(), "logit": logits_TE}[score]
    weights_TK = scores_TE.gather(1, ids_TK)
    return scale * (weights_TK / weights_TK.sum(dim=1, keepdim=True) if renormalise else weights_TK)


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


def checksum(bits: NDArray[np.integer], positions: NDArray[np.uint64]) -> int:
    """Sum over elements of mix(bits ^ mix(position)), modulo 2**64; bits are extended by their sign."""

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output."""
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
        return mixed

    return int(mix(bits.astype(np.uint64) ^ mix(positions)).sum(dtype=np.uint64))
