"""The schedule: linear warm-up, half a cosine, the minimum at the last step."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.config import TrainSection
from ep_engine.training.schedule import learning_rate, warmup_steps


def schedule(**keys: Any) -> list[float]:
    """The rate of every step."""
    train = TrainSection(**{"learning_rate": 1.0, "min_learning_rate": 0.2, **keys})
    return [learning_rate(train, step) for step in range(train.steps)]


def test_schedule_by_hand() -> None:
    # 4 steps up to 1, then cosines of 0, 45, 90, 135 and 180 degrees around 0.6
    low, high = 0.6 - 0.4 * math.sqrt(0.5), 0.6 + 0.4 * math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, high, 0.6, low, 0.2]
    assert schedule(steps=9, warmup_steps=4) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert schedule(steps=3, warmup_steps=0) == pytest.approx([1.0, 0.6, 0.2], rel=1e-12)


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert schedule(steps=3, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75], rel=1e-12)


def test_equal_peak_and_minimum_are_a_constant_rate() -> None:
    assert schedule(steps=5, warmup_steps=0, min_learning_rate=1.0) == [1.0] * 5


@given(steps=st.integers(1, 60), warmup=st.integers(0, 60), peak=st.floats(1e-6, 1.0), share=st.floats(0.0, 1.0))
def test_rates_rise_to_the_peak_and_fall_to_the_minimum(steps: int, warmup: int, peak: float, share: float) -> None:
    low = peak * share
    rates = schedule(steps=steps, warmup_steps=warmup, learning_rate=peak, min_learning_rate=low)
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(0 < a < b for a, b in pairwise(rising))
    assert all(a >= b for a, b in pairwise(falling))
    assert max(rates) <= peak * (1 + 1e-12)
    if falling:
        assert falling[0] == pytest.approx(peak)
    if len(falling) > 1:
        assert falling[-1] == pytest.approx(low)


def test_a_line_and_a_plateau_by_hand() -> None:
    assert schedule(steps=7, warmup_steps=2, schedule="linear") == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    wsd = schedule(steps=9, warmup_steps=2, schedule="wsd", decay_steps=4)
    assert wsd == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert schedule(steps=40, warmup_steps=0, schedule="wsd")[35:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_warm_up_may_be_told_in_tokens() -> None:
    train = TrainSection(steps=9, warmup_tokens=1000)
    assert warmup_steps(train, 300) == 4
    assert [learning_rate(train, step, 300) for step in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
