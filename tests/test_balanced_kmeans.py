"""Balanced k-means: clusters that are plain to see, and the best of a few points."""

from itertools import permutations

import numpy as np
import pytest
import torch

from checkpoint_tools.balanced_kmeans import Metric, balanced_kmeans

METRICS: list[Metric] = ["l2", "cos"]


@pytest.mark.parametrize("metric", METRICS)
def test_clusters_that_are_plain_to_see_are_found(metric: Metric) -> None:
    draw = torch.Generator().manual_seed(0)
    centre_ED = torch.nn.functional.normalize(torch.randn(6, 24, generator=draw), dim=1)
    hidden_N = torch.arange(60) % 6
    x_ND = centre_ED[hidden_N] + 0.05 * torch.randn(60, 24, generator=draw)
    if metric == "cos":
        x_ND *= torch.rand(60, 1, generator=draw) + 0.5  # lengths say nothing
    found = min((balanced_kmeans(x_ND, 6, metric=metric, seed=seed) for seed in range(5)), key=lambda one: one.inertia)
    pairs = {(int(label), int(group)) for label, group in zip(found.label_N, hidden_N, strict=True)}
    assert len(pairs) == 6


def test_inertia_is_that_of_the_labels_and_the_best_of_some_starts_is_the_best_there_is() -> None:
    x_ND = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def inertia(labels: tuple[int, ...]) -> float:
        return sum(
            float((rows - rows.mean(dim=0)).square().sum())
            for rows in (x_ND[torch.tensor(labels) == cluster] for cluster in range(2))
        )

    every = [inertia(labels) for labels in set(permutations((0, 0, 0, 1, 1, 1)))]
    starts = [balanced_kmeans(x_ND, 2, seed=seed) for seed in range(8)]
    for start in starts:
        assert start.inertia == pytest.approx(inertia(tuple(start.label_N.tolist())), rel=1e-5)
    assert min(start.inertia for start in starts) == pytest.approx(min(every), rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_seed_gives_the_same_clusters_and_equal_rows_are_no_trouble(metric: Metric) -> None:
    x_ND = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    one, two = (balanced_kmeans(x_ND, 4, metric=metric, seed=3) for _ in range(2))
    assert np.array_equal(one.label_N, two.label_N)
    same = balanced_kmeans(torch.ones(12, 4), 3, metric=metric)
    assert np.bincount(same.label_N).tolist() == [4, 4, 4]
    assert same.inertia == pytest.approx(0, abs=1e-5)
