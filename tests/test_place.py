"""Placements found against brute force, a planted answer and the published numbers."""

import json
from itertools import pairwise, permutations
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine import place as place_module
from ep_engine.collaboration import Profile, describe_placement, device_load, intra_device_fraction
from ep_engine.errors import UserError
from ep_engine.place import EXHAUSTIVE, check_fits, num_partitions, place
from ep_engine.placement import Placement
from tests.counts import DATA, profile_of, published, random_profile, symmetric

# Layer 0 of LLaMA-MoE-3.5B (2/8), counted by the authors of C2R.
LAYER_0 = np.array(
    [
        [0, 2256, 0, 15105, 0, 122, 825, 149],
        [2256, 0, 23, 41798, 360, 147, 8537, 7207],
        [0, 23, 0, 1, 1379, 9, 19, 63],
        [15105, 41798, 1, 0, 19, 8, 47436, 1346],
        [0, 360, 1379, 19, 0, 11212, 1030, 6212],
        [122, 147, 9, 8, 11212, 0, 39, 59478],
        [825, 8537, 19, 47436, 1030, 39, 0, 20],
        [149, 7207, 63, 1346, 6212, 59478, 20, 0],
    ]
)


def groups(placement: Placement, layer: int) -> list[list[int]]:
    """The experts of every device."""
    per_device = placement.slots_per_device
    slots = placement.layers[layer]
    return [[e for e in slots[first : first + per_device] if e >= 0] for first in range(0, len(slots), per_device)]


def found_fraction(found: dict[str, Any], layer: int = 0) -> float:
    return float(found["placed"]["layers"][layer]["intra_device_fraction"])


def best_of_all_orders(counts: NDArray[np.int64], sizes: list[int]) -> float:
    """The largest share of pairs inside devices, over every order of the experts cut into devices of these sizes."""
    ends = [0, *np.cumsum(sizes).tolist()]
    cuts = list(pairwise(ends))
    orders = permutations(range(len(counts)))
    most = max(sum(int(counts[np.ix_(o[a:b], o[a:b])].sum()) for a, b in cuts) for o in map(list, orders))
    return most / counts.sum() if counts.sum() else 1.0


def partitions_counted(sizes: list[int]) -> int:
    """Number of ways, by writing down every one as a set of sets."""
    ends = [0, *np.cumsum(sizes).tolist()]
    orders = permutations(range(sum(sizes)))
    return len({frozenset(frozenset(order[a:b]) for a, b in pairwise(ends)) for order in orders})


@pytest.mark.parametrize(
    "sizes", [[1], [4], [2, 2], [1, 1, 1], [3, 2], [2, 1, 2], [4, 3], [2, 2, 2], [3, 1, 1]], ids=str
)
def test_number_of_partitions_is_that_of_an_enumeration(sizes: list[int]) -> None:
    assert num_partitions(sizes) == partitions_counted(sizes)


def test_number_of_partitions_by_hand() -> None:
    assert [num_partitions([4, 4]), num_partitions([2] * 4), num_partitions([8, 8])] == [35, 105, 6435]
    assert (
        num_partitions([8, 7] * 4)
        == factorial(60) // (factorial(8) * factorial(7) * factorial(4)) ** 4 * factorial(4) ** 2
    )


def test_strangers_stay_in_the_order_of_their_ids() -> None:
    placement, found = place(profile_of(np.zeros((1, 4, 4), dtype=np.int64)), 2)
    assert placement.layers == [[0, 1, 2, 3]]
    assert found["exact"] is True
    assert found_fraction(found) == 1.0


def test_placement_by_hand() -> None:
    # 0-3 and 1-2 work together; ids in a slot rise, and device 0 has expert 0
    placement, found = place(profile_of(symmetric(1, 4, [1, 0, 9, 7, 0, 2])), 2)
    assert placement == Placement(devices=2, nodes=1, factors=(2,), layers=[[0, 3, 1, 2]])
    assert found == {
        "placed": {
            "intra_device_fraction": 16 / 19,
            "load_max_over_mean": pytest.approx(21 / 19),
            "layers": [{"intra_device_fraction": 16 / 19, "load_max_over_mean": pytest.approx(21 / 19)}],
        },
        "contiguous": {
            "intra_device_fraction": 3 / 19,
            "load_max_over_mean": pytest.approx(20 / 19),
            "layers": [{"intra_device_fraction": 3 / 19, "load_max_over_mean": pytest.approx(20 / 19)}],
        },
        "exact": True,
        "over_cap": [],
    }


@pytest.mark.parametrize(
    ("num_experts", "devices"), [(1, 1), (2, 2), (5, 1), (5, 2), (6, 2), (6, 3), (6, 4), (7, 2), (7, 3)]
)
def test_search_finds_the_best_of_all_orders(num_experts: int, devices: int) -> None:
    profile = random_profile(2, num_experts, seed=devices, largest=9)
    placement, found = place(profile, devices)
    assert found["exact"] is True
    for layer in range(2):
        sizes = [len(group) for group in groups(placement, layer)]
        assert sizes == [len(group) for group in groups(Placement.contiguous(num_experts, devices, 1), 0)]
        assert found_fraction(found, layer) == pytest.approx(
            best_of_all_orders(profile.counts[layer], sizes), abs=1e-12
        )


def test_7_experts_on_2_devices_leave_one_slot_empty() -> None:
    placement, _ = place(random_profile(1, 7, seed=1), 2)
    assert placement.layers[0].count(-1) == 1
    assert [len(group) for group in groups(placement, 0)] == [4, 3]
    assert sorted(expert for group in groups(placement, 0) for expert in group) == list(range(7))


@given(seed=st.integers(0, 2**32), devices=st.sampled_from([2, 3, 4]))
def test_descent_is_as_good_as_the_search_for_8_experts(seed: int, devices: int) -> None:
    profile = random_profile(1, 8, seed)
    _, searched = place(profile, devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_module, "EXHAUSTIVE", 0)
        placement, descended = place(profile, devices, seed=seed)
    assert (searched["exact"], descended["exact"]) == (True, False)
    assert found_fraction(descended) == pytest.approx(found_fraction(searched), abs=1e-12)
    assert found_fraction(descended) == intra_device_fraction(profile.counts[0], placement.device_of_expert(0))


@given(seed=st.integers(0, 2**32), num_experts=st.integers(17, 40), devices=st.integers(2, 9))
def test_descent_is_never_worse_than_the_order_of_ids(seed: int, num_experts: int, devices: int) -> None:
    profile = random_profile(1, num_experts, seed)
    placement, found = place(profile, devices, seed=seed)
    assert found["exact"] is False
    assert found["placed"]["intra_device_fraction"] >= found["contiguous"]["intra_device_fraction"]
    by_id = Placement.contiguous(num_experts, devices, 1)
    assert list(map(len, groups(placement, 0))) == list(map(len, groups(by_id, 0)))
    assert Placement.model_validate(placement.model_dump()) == placement


@pytest.mark.parametrize(("num_experts", "devices"), [(16, 2), (16, 4), (60, 8), (64, 8)])
def test_planted_groups_are_found(num_experts: int, devices: int) -> None:
    random = np.random.default_rng(0)
    by_id = Placement.contiguous(num_experts, devices, 1)
    device_E = np.array(by_id.device_of_expert(0))[random.permutation(num_experts)]
    noise = symmetric(1, num_experts, random.integers(0, 5, num_experts * (num_experts - 1) // 2))[0]
    counts = noise + 100 * (device_E[:, None] == device_E[None, :])
    placement, _ = place(profile_of(counts), devices)
    planted = {tuple(np.flatnonzero(device_E == device).tolist()) for device in range(devices)}
    assert {tuple(group) for group in groups(placement, 0)} == planted


def test_the_same_seed_gives_the_same_placement() -> None:
    profile = random_profile(2, 24, seed=0)
    first, second = place(profile, 4, seed=3), place(profile, 4, seed=3)
    assert first == second
    assert num_partitions([6] * 4) > EXHAUSTIVE


def test_the_tree_begins_with_the_nodes_and_progress_is_told() -> None:
    done: list[int] = []
    placement, _ = place(random_profile(3, 8, seed=0), 4, nodes=2, advance=done.append)
    assert (placement.nodes, placement.factors, len(placement.layers)) == (2, (2, 2), 3)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("devices", [0, 9, -2])
def test_devices_that_do_not_fit_are_refused(devices: int) -> None:
    profile = random_profile(1, 8, seed=0)
    sentence = rf"^--devices \({devices}\) must be in 1\.\.8, the experts of p\.npz; choose it there$"
    with pytest.raises(UserError, match=sentence):
        check_fits(profile, devices, Path("p.npz"))
    with pytest.raises(UserError, match=f"8 experts do not fit {devices} devices"):
        place(profile, devices)
    check_fits(profile, 8, Path("p.npz"))


def test_nodes_that_do_not_divide_the_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"nodes \(3\) must divide devices \(4\)"):
        place(random_profile(1, 8, seed=0), 4, nodes=3)


@pytest.mark.parametrize(
    ("devices", "best", "by_id", "groups_of_experts"),
    [
        (2, 0.9488, 0.6698, [[0, 1, 3, 6], [2, 4, 5, 7]]),
        (4, 0.5398, 0.0659, [[0, 1], [2, 4], [3, 6], [5, 7]]),
    ],
)
def test_one_published_layer(devices: int, best: float, by_id: float, groups_of_experts: list[list[int]]) -> None:
    placement, found = place(profile_of(LAYER_0), devices)
    assert groups(placement, 0) == groups_of_experts
    # four digits are printed: specs/c2r.md 5.5
    assert found["placed"]["intra_device_fraction"] == pytest.approx(best, abs=5e-5)
    assert found["contiguous"]["intra_device_fraction"] == pytest.approx(by_id, abs=5e-5)


@published
@pytest.mark.parametrize("exhaustive", [EXHAUSTIVE, 0], ids=["search", "descent"])
@pytest.mark.parametrize(("devices", "best", "by_id", "load"), [(2, 0.7316, 0.4155, 1.036), (4, 0.4779, 0.1299, 1.109)])
def test_published_layers(
    devices: int, best: float, by_id: float, load: float, exhaustive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_module, "EXHAUSTIVE", exhaustive)
    counts = np.load(DATA / "llama_moe_collaboration.npz")["base"]
    reference = json.loads((DATA / "placement_reference.json").read_text())[f"base/D{devices}"]
    placement, found = place(profile_of(counts), devices)
    # as many digits as are printed
    assert found["placed"]["intra_device_fraction"] == pytest.approx(best, abs=5e-5)
    assert found["contiguous"]["intra_device_fraction"] == pytest.approx(by_id, abs=5e-5)
    assert found["placed"]["load_max_over_mean"] == pytest.approx(load, abs=5e-4)
    assert [found_fraction(found, i) for i in range(32)] == pytest.approx(reference["best"], abs=1e-12)
    # the best placement of every layer is unique
    assert [sorted(groups(placement, i)) for i in range(32)] == reference["placement"]


@published
@pytest.mark.parametrize("name", ["topt_1", "topt_2", "topt_3"])
@pytest.mark.parametrize("devices", [2, 4])
def test_published_profiles_of_constrained_models(name: str, devices: int) -> None:
    counts = np.load(DATA / "llama_moe_collaboration.npz")[name]
    reference = json.loads((DATA / "placement_reference.json").read_text())[f"{name}/D{devices}"]
    _, found = place(profile_of(counts), devices)
    assert [found_fraction(found, i) for i in range(32)] == pytest.approx(reference["best"], abs=1e-12)


@pytest.mark.parametrize(("num_experts", "devices"), [(8, 2), (24, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_no_device_exceeds_a_load_cap_that_can_be_held(seed: int, num_experts: int, devices: int) -> None:
    """The busy experts work with one another: without a cap they lie together, with one they are spread."""
    random = np.random.default_rng(seed)
    load = np.where(np.arange(num_experts) < devices, 90, 10) + random.integers(0, 5, num_experts)
    counts = np.triu(random.integers(0, 3, (num_experts, num_experts)), 1)
    counts[:devices, :devices] = np.triu(np.full((devices, devices), 50), 1)
    profile = Profile((counts + counts.T)[None], load[None].astype(np.int64), top_k=2, about={})
    free, found = place(profile, devices, seed=seed)
    assert found["over_cap"] == []
    assert describe_placement(profile, free)[0]["load_max_over_mean"] > 1.5
    _, capped = place(profile, devices, load_cap=1.1, seed=seed)
    assert capped["over_cap"] == []
    assert capped["placed"]["load_max_over_mean"] <= 1.1
    assert capped["placed"]["intra_device_fraction"] < found["placed"]["intra_device_fraction"]


def test_a_capped_search_finds_the_best_of_all_orders_within_the_cap() -> None:
    random = np.random.default_rng(0)
    counts = np.triu(random.integers(0, 20, (6, 6)), 1)
    load = np.array([60, 50, 20, 10, 30, 10])
    profile = Profile((counts + counts.T)[None], load[None].astype(np.int64), top_k=2, about={})
    placement, _ = place(profile, 2, load_cap=1.15)
    within = [
        devices
        for devices in set(permutations([0, 0, 0, 1, 1, 1]))
        if device_load(load, list(devices), 2).max() <= 1.15
    ]
    assert 2 < len(within) < 20
    best = max(intra_device_fraction(profile.counts[0], list(devices)) for devices in within)
    assert intra_device_fraction(profile.counts[0], placement.device_of_expert(0)) == best


@pytest.mark.parametrize(("num_experts", "devices"), [(4, 2), (64, 32)])
def test_a_cap_that_cannot_be_held_is_said_and_exceeded_least(num_experts: int, devices: int) -> None:
    """One expert gets more than a device may."""
    load = np.full(num_experts, 10)
    load[1] = 1000
    load[2] = 5  # the one that should lie beside it
    counts = np.ones((num_experts, num_experts), dtype=np.int64) - np.eye(num_experts, dtype=np.int64)
    profile = Profile(counts[None], load[None].astype(np.int64), top_k=2, about={})
    placement, found = place(profile, devices, load_cap=1.1)
    assert found["over_cap"] == [0]
    device_of = placement.device_of_expert(0)
    assert device_of[1] == device_of[2]


@pytest.mark.parametrize("cap", [0.9, float("nan"), float("inf")])
def test_a_cap_that_means_nothing_is_refused(cap: float) -> None:
    with pytest.raises(UserError, match=r"--load-cap \((0.9|nan|inf)\) must be at least 1"):
        place(random_profile(1, 4, 0), 2, load_cap=cap)
