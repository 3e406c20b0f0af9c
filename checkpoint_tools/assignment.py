"""Which neuron goes to which expert: exactly, one after the other, or shared (LLaMA-MoE, arXiv:2406.16554 section 3.1).

Scores say how much an expert wants a neuron, (E, N); all results are lists of neurons by expert. Of equal scores the
lower neuron comes first in an expert's order.

Shape letters:  N neurons   E experts   S neurons of an expert
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import min_cost_flow

Neurons = list[NDArray[np.int64]]

_COST_STEPS = 1_000_000  # that the range of costs is divided into: the flow's costs are integers


class Balanced:
    """Rows to columns, each with as many rows, at the least sum of costs; the flow's arcs are made once.

    Args:
        num_rows: N, a multiple of E.
        num_columns: E.
    """

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self._shape = num_rows, num_columns
        size = num_rows // num_columns
        self._tails = np.repeat(np.arange(num_rows, dtype=np.int32), num_columns)
        self._heads = np.tile(np.arange(num_rows, num_rows + num_columns, dtype=np.int32), num_rows)
        self._supplies = np.concatenate([np.ones(num_rows, np.int64), np.full(num_columns, -size, np.int64)])

    def assign(self, cost_NE: NDArray[np.floating]) -> NDArray[np.int64]:
        """Column of every row, (N,), for finite costs; the sum is least to a millionth of their range for each row."""
        low, high = float(cost_NE.min()), float(cost_NE.max())
        scale = _COST_STEPS / (high - low) if high > low else 0.0
        cost = np.rint((cost_NE.astype(np.float64) - low) * scale).astype(np.int64).ravel()
        flow = min_cost_flow.SimpleMinCostFlow()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(self._tails, self._heads, np.ones_like(cost), cost)
        flow.set_nodes_supplies(np.arange(len(self._supplies), dtype=np.int32), self._supplies)
        status = flow.solve()
        assert status == flow.OPTIMAL, f"every row fits somewhere, and yet the flow ends with {status}"
        column_N: NDArray[np.int64] = flow.flows(arcs).reshape(self._shape).argmax(axis=1)
        return column_N


def optimal(score_EN: NDArray[np.floating], free_N: NDArray[np.bool_] | None = None) -> Neurons:
    """Every free neuron to one expert, as many to each, with the largest sum of scores; ascending within an expert."""
    free = np.arange(score_EN.shape[1]) if free_N is None else np.flatnonzero(free_N)
    expert_N = Balanced(len(free), len(score_EN)).assign(-score_EN[:, free].T)
    return [free[expert_N == expert] for expert in range(len(score_EN))]


def greedy(score_EN: NDArray[np.floating], size: int, free_N: NDArray[np.bool_] | None = None) -> Neurons:
    """The published way: of the best free neuron of every expert that is not full, the best score goes first.

    Of equal scores the highest expert wins. Lists are in the order in which they grew; E * S neurons find a place.
    """
    num_experts, width = score_EN.shape
    order_EN = np.argsort(-score_EN, axis=1, kind="stable")
    chosen: list[list[int]] = [[] for _ in range(num_experts)]
    free_N, at = np.ones(width, dtype=bool) if free_N is None else free_N.copy(), [0] * num_experts
    for _ in range(num_experts * size):
        best = -1
        for expert in range(num_experts):
            if len(chosen[expert]) == size:
                continue
            while not free_N[order_EN[expert, at[expert]]]:
                at[expert] += 1
            score = score_EN[expert, order_EN[expert, at[expert]]]
            if best < 0 or score >= score_EN[best, order_EN[best, at[best]]]:
                best = expert
        neuron = order_EN[best, at[best]]
        chosen[best].append(int(neuron))
        free_N[neuron] = False
    return [np.array(neurons, dtype=np.int64) for neurons in chosen]


def residual(score_EN: NDArray[np.floating], size: int, count: int) -> Neurons:
    """Inter sharing: the neurons that most experts want, for `count` experts of S that every token goes through.

    In rounds: of the best S neurons of every expert that are left, those that most of them name, lower ids first.
    """
    order = [order_N.tolist() for order_N in np.argsort(-score_EN, axis=1, kind="stable")]
    taken: list[int] = []
    while len(taken) < count * size:
        wanted = Counter(neuron for order_N in order for neuron in order_N[:size])
        most = max(wanted.values())
        taken += sorted(neuron for neuron, times in wanted.items() if times == most)[: count * size - len(taken)]
        gone = set(taken)
        order = [[neuron for neuron in order_N if neuron not in gone] for order_N in order]
    return [np.array(part, dtype=np.int64) for part in np.array_split(taken, count)]


def shared(score_EN: NDArray[np.floating], size: int, free_N: NDArray[np.bool_] | None = None) -> Neurons:
    """Inner sharing: every expert takes its best S free neurons, whoever else has them; best first."""
    order_EN = np.argsort(-score_EN, axis=1, kind="stable")
    return [order_N[slice(None) if free_N is None else free_N[order_N]][:size] for order_N in order_EN]
