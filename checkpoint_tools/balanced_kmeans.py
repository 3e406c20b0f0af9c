"""Balanced k-means: clusters of one size, of rows that lie close (LLaMA-MoE's clustering split, specification 1.2).

Lloyd's two steps, of which the first is exact: every row goes to a cluster so that all clusters have the same size and
the sum of squared distances is least, a transport problem (Bradley, Bennett, Demiriz, MSR-TR-2000-65; assignment.py).
The second takes the mean of a cluster's rows. Neither step makes the inertia larger.

`l2` is the distance of the rows as they are; `cos` that of their directions, with centres of length one.

Shape letters:  N rows   D their length   E clusters, which divide N
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoint_tools.assignment import Balanced

Metric = Literal["l2", "cos"]

_MAX_STEPS = 500
_TOLERANCE = 1e-4  # of the mean variance of a column: how far centres may still move, squared and summed


@dataclass(frozen=True)
class Clusters:
    """What was found.

    Attributes:
        label_N: int64, the cluster of every row.
        inertia: sum over rows of the squared distance to their centre.
        steps: until centres stood still.
    """

    label_N: NDArray[np.int64]
    inertia: float
    steps: int


def balanced_kmeans(x_ND: Tensor, num_clusters: int, *, metric: Metric = "l2", seed: int = 0) -> Clusters:
    """Cluster rows.

    Args:
        x_ND: float32, any scale; no row is zero if the metric is `cos`.
        num_clusters: E, divides N.
        metric: `l2` or `cos`.
        seed: of the first centres.
    """
    if metric == "cos":
        x_ND = torch.nn.functional.normalize(x_ND, dim=1)
    centre_ED = _first_centres(x_ND, num_clusters, torch.Generator().manual_seed(seed))
    squares_N1 = x_ND.square().sum(dim=1, keepdim=True)
    smallest_move = _TOLERANCE * float(x_ND.var(dim=0, correction=0).mean())
    balanced = Balanced(len(x_ND), num_clusters)
    steps, move = 0, math.inf
    while move > smallest_move and steps < _MAX_STEPS:
        label_N = balanced.assign(_distances(x_ND, squares_N1, centre_ED).numpy())
        moved_ED = _centres(x_ND, torch.from_numpy(label_N), num_clusters, metric)
        move = float((moved_ED - centre_ED).square().sum())
        centre_ED = moved_ED
        steps += 1
    label_N = balanced.assign(_distances(x_ND, squares_N1, centre_ED).numpy())
    inertia = float((x_ND - centre_ED[torch.from_numpy(label_N)]).square().sum(dtype=torch.float64))
    return Clusters(label_N, inertia, steps)


def _first_centres(x_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: every next centre is a row drawn in proportion to its squared distance from the nearest so far."""
    squares_N1 = x_ND.square().sum(dim=1, keepdim=True)
    chosen = [int(torch.randint(len(x_ND), (), generator=generator))]
    nearest_N = torch.full((len(x_ND),), torch.inf)
    for _ in range(num_clusters - 1):
        nearest_N = torch.minimum(nearest_N, _distances(x_ND, squares_N1, x_ND[chosen[-1:]])[:, 0])
        weights = nearest_N if float(nearest_N.sum()) > 0 else torch.ones_like(nearest_N)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return x_ND[chosen].clone()


def _distances(x_ND: Tensor, squares_N1: Tensor, centre_ED: Tensor) -> Tensor:
    """Squared distances (N, E)."""
    return (squares_N1 - 2 * (x_ND @ centre_ED.t()) + centre_ED.square().sum(dim=1)).clamp_(min=0)


def _centres(x_ND: Tensor, label_N: Tensor, num_clusters: int, metric: Metric) -> Tensor:
    sum_ED = torch.zeros(num_clusters, x_ND.shape[1]).index_add_(0, label_N, x_ND)
    if metric == "cos":
        return torch.nn.functional.normalize(sum_ED, dim=1)
    return sum_ED / (len(x_ND) // num_clusters)
