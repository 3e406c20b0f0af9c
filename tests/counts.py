"""Co-activation counts that tests make, and where the published ones are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile

DATA = Path(__file__).parents[2] / "shared" / "data" / "c2r"
published = pytest.mark.skipif(not DATA.is_dir(), reason=f"the published counts of C2R are not at {DATA}")


def symmetric(num_layers: int, num_experts: int, pairs: list[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """(L, E, E) of the counts of pairs i < j of every layer, row by row; the diagonal is 0."""
    counts = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
    rows, columns = np.triu_indices(num_experts, 1)
    counts[:, rows, columns] = np.reshape(pairs, (num_layers, -1))
    return counts + counts.transpose(0, 2, 1)


def profile_of(counts: NDArray[np.int64]) -> Profile:
    """A profile of (L, E, E) or (E, E) counts of tokens that have two experts each."""
    counts = counts if counts.ndim == 3 else counts[None]
    return Profile(counts, counts.sum(axis=2), 2, {})


def random_profile(num_layers: int, num_experts: int, seed: int, largest: int = 50) -> Profile:
    """Every pair of experts served fewer than `largest` tokens together."""
    size = num_layers * num_experts * (num_experts - 1) // 2
    return profile_of(symmetric(num_layers, num_experts, np.random.default_rng(seed).integers(0, largest, size)))


# Tokens that two of four experts served together: 0-1 five, 0-2 one, 0-3 three, 1-2 three, 1-3 three, 2-3 none.
COUNTS = np.array([[0, 5, 1, 3], [5, 0, 3, 3], [1, 3, 0, 0], [3, 3, 0, 0]])
LOAD = COUNTS.sum(axis=1)  # every token has two experts


@st.composite
def many_counts(draw: Any) -> NDArray[np.int64]:
    """Small counts, so that ties are common."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    size = num_layers * num_experts * (num_experts - 1) // 2
    return symmetric(num_layers, num_experts, draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
