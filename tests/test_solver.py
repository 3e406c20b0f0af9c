"""The placement solver against all placements there are: pairs, tokens, nodes, caps, and the answer it promises."""

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.c2r.solver import ANY, Effort, Found, least_room, solve
from ep_engine.placement import Placement

NODE_WEIGHT = 3
SHAPES = [(3, 3, 1), (5, 2, 1), (6, 2, 2), (7, 2, 1), (5, 4, 2), (6, 4, 2), (8, 4, 2)]  # experts, devices, nodes
SEARCH_ONLY = Effort(partitions=0)
PROOF = Effort(starts=1, patience=0)  # what the search finds is no help


def placements(num_experts: int, devices: int) -> Iterator[tuple[int, ...]]:
    """Every one with as many experts on each device or one less."""
    sizes = [len(part) for part in np.array_split(np.arange(num_experts), devices)]
    for of_device in set(permutations(sizes)):
        yield from set(permutations([device for device, size in enumerate(of_device) for _ in range(size)]))


class Layer:
    """Random experts of tokens, and what a placement of them is worth."""

    def __init__(self, seed: int, num_experts: int, devices: int, nodes: int, top_k: int = 3) -> None:
        random = np.random.default_rng(seed)
        scores = random.gumbel(size=(30, num_experts)) + random.normal(size=num_experts)
        self.ids_TK = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int16)
        self.pairs_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
        for token in self.ids_TK:
            self.pairs_EE[np.ix_(token, token)] += 1
        self.load_E = np.diagonal(self.pairs_EE).copy()
        np.fill_diagonal(self.pairs_EE, 0)
        self.devices, self.nodes = devices, nodes

    def levels(self, device_E: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
        yield device_E, 1
        if 1 < self.nodes < self.devices:
            yield device_E * self.nodes // self.devices, NODE_WEIGHT

    def value(self, of: str, device_of_expert: list[int] | tuple[int, ...]) -> int:
        total = 0
        for group_E, weight in self.levels(np.array(device_of_expert)):
            if of == "pairs":
                total += weight * int(self.pairs_EE[group_E[:, None] == group_E[None, :]].sum()) // 2
            else:
                total -= weight * sum(len(set(groups)) for groups in group_E[self.ids_TK].tolist())
        return total

    def excess(self, device_of_expert: list[int] | tuple[int, ...], room: int) -> int:
        load_D = np.bincount(device_of_expert, weights=self.load_E, minlength=self.devices)
        return int(np.maximum(load_D - room, 0).sum())

    def solve(self, of: str, room: int, effort: Effort) -> Found:
        return solve(
            self.load_E,
            self.devices,
            pairs_EE=self.pairs_EE if of == "pairs" else None,
            ids_TK=self.ids_TK if of == "tokens" else None,
            nodes=self.nodes,
            node_weight=NODE_WEIGHT,
            room=room,
            effort=effort,
        )

    def best(self, of: str, room: int) -> tuple[int, int]:
        """Of all placements: excess, and the largest value with no more."""
        return min((self.excess(one, room), -self.value(of, one)) for one in placements(len(self.load_E), self.devices))


@pytest.mark.parametrize("effort", [Effort(), PROOF], ids=["both", "proof"])
@pytest.mark.parametrize("of", ["pairs", "tokens"])
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES), roomy=st.sampled_from([1.0, 1.1, 1.5, None]))
@settings(max_examples=30)
def test_what_is_proven_is_the_best_of_all_placements(
    of: str, effort: Effort, seed: int, shape: tuple[int, int, int], roomy: float | None
) -> None:
    layer = Layer(seed, *shape)
    room = ANY if roomy is None else int(roomy * layer.load_E.sum() / layer.devices)
    found = layer.solve(of, room, effort)
    assert found.proven
    assert found.excess == layer.excess(found.device_of_expert, room)
    assert (found.excess, -layer.value(of, found.device_of_expert)) == layer.best(of, room)


@pytest.mark.parametrize("of", ["pairs", "tokens"])
@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(5, 2, 1), (7, 3, 1), (6, 2, 2), (8, 4, 2), (7, 4, 2)]))
@settings(max_examples=25)
def test_the_search_alone_finds_the_best_of_few(of: str, seed: int, shape: tuple[int, int, int]) -> None:
    layer = Layer(seed, *shape)
    for roomy in (None, 1.2):
        room = ANY if roomy is None else int(roomy * layer.load_E.sum() / layer.devices)
        found = layer.solve(of, room, SEARCH_ONLY)
        assert (found.excess, -layer.value(of, found.device_of_expert)) == layer.best(of, room)


@given(seed=st.integers(0, 2**32), num_experts=st.integers(1, 7), devices=st.integers(1, 4))
@settings(max_examples=40)
def test_of_equal_placements_the_first_is_taken(seed: int, num_experts: int, devices: int) -> None:
    """Devices numbered as experts first use them, the least list of devices."""
    devices = min(devices, num_experts)
    random = np.random.default_rng(seed)
    pairs = np.triu(random.integers(0, 2, (num_experts, num_experts)), 1)  # full of ties
    pairs += pairs.T
    found = solve(np.ones(num_experts, dtype=np.int64), devices, pairs_EE=pairs)
    value = {}
    for one in placements(num_experts, devices):
        order = list(dict.fromkeys(one))
        same = np.array(one)[:, None] == np.array(one)[None, :]
        value[tuple(order.index(device) for device in one)] = int(pairs[same].sum())
    most = max(value.values())
    assert tuple(found.device_of_expert) == min(one for one, mass in value.items() if mass == most)


@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(40, 4, 1), (41, 8, 1), (45, 8, 2), (64, 8, 4)]))
@settings(max_examples=15)
def test_larger_layers_are_placed_with_the_sizes_of_the_order_of_ids(seed: int, shape: tuple[int, int, int]) -> None:
    num_experts, devices, nodes = shape
    layer = Layer(seed, *shape, top_k=4)
    by_id = Placement.contiguous(num_experts, devices, 1, nodes=nodes).device_of_expert(0)
    for of in ("pairs", "tokens"):
        found = layer.solve(of, ANY, Effort(starts=4, patience=30))
        sizes = [np.sort(np.bincount(one, minlength=devices)).tolist() for one in (found.device_of_expert, by_id)]
        assert sizes[0] == sizes[1]
        assert layer.value(of, found.device_of_expert) >= layer.value(of, by_id)
        assert not found.cut_short


def test_the_same_seed_finds_the_same() -> None:
    layer = Layer(0, 64, 8, 2, top_k=6)
    for of in ("pairs", "tokens"):
        once, again = (layer.solve(of, ANY, Effort(seed=7, starts=6, patience=50)) for _ in range(2))
        assert once == again


@given(loads=st.lists(st.integers(0, 50), min_size=2, max_size=7), devices=st.integers(1, 4))
def test_the_least_room_is_that_of_the_best_spread(loads: list[int], devices: int) -> None:
    devices = min(devices, len(loads))
    load = np.array(loads)
    assert least_room(load, devices) == min(
        int(np.bincount(one, weights=load, minlength=devices).max()) for one in placements(len(load), devices)
    )


def test_more_tokens_than_a_count_of_32_bits_holds() -> None:
    pairs = np.array([[0, 1, 3, 0], [1, 0, 0, 3], [3, 0, 0, 1], [0, 3, 1, 0]]) * 2**40
    found = solve(pairs.sum(axis=1), 2, pairs_EE=pairs, room=5 * 2**40 * 2)
    assert found.device_of_expert == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": 5},
        {"devices": 0},
        {"nodes": 3},
        {"pairs_EE": None},
        {"ids_TK": np.zeros((1, 1), dtype=np.int16)},
        {"pairs_EE": np.zeros((3, 4), dtype=np.int64)},
        {"pairs_EE": None, "ids_TK": np.array([[0, 4]], dtype=np.int16)},
        {"pairs_EE": None, "ids_TK": np.array([[0, -1]], dtype=np.int16)},
    ],
    ids=str,
)
def test_what_would_lead_the_solver_astray_does_not_reach_it(wrong: dict[str, object]) -> None:
    given_values = {"devices": 2, "pairs_EE": np.zeros((4, 4), dtype=np.int64), **wrong}
    with pytest.raises(AssertionError):
        solve(np.ones(4, dtype=np.int64), **given_values)  # type: ignore[arg-type]
