"""Balanced k-means: clusters of one size, of rows that lie close (LLaMA-MoE's clustering split, specification 1.2).

Lloyd's two steps, of which the first is exact: every row goes to a cluster so that all clusters have the same size and
the sum of squared distances is least, a transport problem (Bradley, Bennett and Demiriz, MSR-TR-2000-65) that OR-tools
solves as a minimum-cost flow. The second takes the mean of a cluster's rows. Neither step makes the inertia larger.

`l2` is the distance of the rows as they are; `cos` that of their directions, with centres of length one.

Shape letters:  N rows   D their length   E clusters, which divide N
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from ortools.graph.python import min_cost_flow
from torch import Tensor

Metric = Literal["l2", "cos"]

_MAX_STEPS = 500
_TOLERANCE = 1e-4  # of the mean variance of a column: how far centres may still move, squared and summed
_COST_STEPS = 1_000_000  # that the largest distance is divided into: the flow's costs are integers


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
    assign = _Assignment(len(x_ND), num_clusters)
    steps, move = 0, math.inf
    while move > smallest_move and steps < _MAX_STEPS:
        label_N = assign(_distances(x_ND, squares_N1, centre_ED))
        moved_ED = _centres(x_ND, label_N, num_clusters, metric)
        move = float((moved_ED - centre_ED).square().sum())
        centre_ED = moved_ED
        steps += 1
    label_N = assign(_distances(x_ND, squares_N1, centre_ED))
    inertia = float((x_ND - centre_ED[label_N]).square().sum(dtype=torch.float64))
    return Clusters(label_N.numpy(), inertia, steps)


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


class _Assignment:
    """Rows to clusters of one size at the least sum of distances; the flow's arcs are made once."""

    def __init__(self, num_rows: int, num_clusters: int) -> None:
        self._shape = num_rows, num_clusters
        size = num_rows // num_clusters
        self._tails = np.repeat(np.arange(num_rows, dtype=np.int32), num_clusters)
        self._heads = np.tile(np.arange(num_rows, num_rows + num_clusters, dtype=np.int32), num_rows)
        self._supplies = np.concatenate([np.ones(num_rows, np.int64), np.full(num_clusters, -size, np.int64)])

    def __call__(self, distance_NE: Tensor) -> Tensor:
        """Labels (N,), int64."""
        scale = _COST_STEPS / max(float(distance_NE.max()), torch.finfo(torch.float32).tiny)
        cost = (distance_NE.double() * scale).round().long().numpy().ravel()
        flow = min_cost_flow.SimpleMinCostFlow()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(self._tails, self._heads, np.ones_like(cost), cost)
        flow.set_nodes_supplies(np.arange(len(self._supplies), dtype=np.int32), self._supplies)
        status = flow.solve()
        assert status == flow.OPTIMAL, f"every row fits somewhere, and yet the flow ends with {status}"
        taken_NE = torch.from_numpy(flow.flows(arcs)).view(self._shape)
        return taken_NE.argmax(dim=1)
