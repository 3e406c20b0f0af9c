"""Neurons to experts: the exact way against scipy's, the published ways against worked examples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from checkpoint_tools.assignment import Balanced, greedy, optimal, shared

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
