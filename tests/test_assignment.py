"""Neurons to experts: the exact way against scipy's, the published ways against worked examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from checkpoint_tools.assignment import Balanced, greedy, optimal, residual, shared

TWO = np.array([[9, 1, 8, 2, 7, 3, 6, 4], [1, 9, 8, 7, 2, 3, 5, 6]], dtype=np.float64)


def as_lists(experts: list[NDArray[np.int64]]) -> list[list[int]]:
    return [neurons.tolist() for neurons in experts]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rows_are_assigned_at_the_least_sum(size: int, columns: int, seed: int) -> None:
    cost_NE = np.random.default_rng(seed).normal(size=(size * columns, columns))
    column_N = Balanced(*cost_NE.shape).assign(cost_NE)
    assert np.bincount(column_N, minlength=columns).tolist() == [size] * columns
    rows, seats = linear_sum_assignment(np.repeat(cost_NE, size, axis=1))
    least = cost_NE[rows, seats // size].sum()
    assert cost_NE[np.arange(len(cost_NE)), column_N].sum() == pytest.approx(least, abs=1e-4)


def test_the_worked_examples_of_the_specification() -> None:
    first, second = greedy(TWO, 4)  # labels 0 1 1 1 0 0 0 1
    assert (sorted(first.tolist()), sorted(second.tolist())) == ([0, 4, 5, 6], [1, 2, 3, 7])
    assert second[0] == 1  # of two nines the later expert's
    assert as_lists(shared(TWO, 4)) == [[0, 2, 4, 6], [1, 2, 3, 7]]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_exact_way_is_no_worse_than_the_greedy_one_and_both_lose_nothing(
    experts: int, size: int, seed: int
) -> None:
    score_EN = np.random.default_rng(seed).random((experts, experts * size))
    sums = {}
    for name, chosen in (("greedy", greedy(score_EN, size)), ("optimal", optimal(score_EN))):
        assert [len(neurons) for neurons in chosen] == [size] * experts
        assert sorted(np.concatenate(chosen)) == list(range(experts * size))
        sums[name] = sum(score_EN[expert, neurons].sum() for expert, neurons in enumerate(chosen))
    assert sums["optimal"] >= sums["greedy"] - 1e-4


def test_what_most_want_is_residual_as_the_specification_has_it() -> None:
    """specs/llama_moe.md 1.4.4 c: two experts and one residual expert of three neurons."""
    score_EN = np.array([[9, 8, 1, 7, 2, 6, 3, 5, 4], [9, 1, 8, 7, 2, 3, 6, 4, 5]], dtype=float)
    (common,) = residual(score_EN, 3, 1)
    assert common.tolist() == [0, 3, 1]
    free_N = ~np.isin(np.arange(9), common)
    assert [one.tolist() for one in shared(score_EN, 3, free_N)] == [[5, 7, 8], [2, 6, 8]]
    assert [one.tolist() for one in greedy(score_EN, 3, free_N)] == [[5, 7, 4], [2, 6, 8]]
    found = optimal(score_EN, free_N)
    assert sorted(np.concatenate(found).tolist()) == [2, 4, 5, 6, 7, 8]
    total = sum(float(score_EN[expert, of].sum()) for expert, of in enumerate(found))
    assert total >= 6 + 5 + 2 + 8 + 6 + 5
    assert [len(part) for part in residual(score_EN, 2, 3)] == [2, 2, 2]
