"""Placements against planted answers and the published numbers, and the report of what was found."""

import json
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile
from ep_engine.c2r.locality import device_load, fraction_inside
from ep_engine.c2r.place import check_fits, on_other_text, parse_cap, place
from ep_engine.errors import UserError
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
    per_device = placement.slots_per_device(0)
    slots = placement.layers[layer]
    return [[e for e in slots[first : first + per_device] if e >= 0] for first in range(0, len(slots), per_device)]


def found_fraction(found: dict[str, Any], layer: int = 0) -> float:
    return float(found["layers"][layer]["placed"]["intra_device_fraction"])


def test_strangers_stay_in_the_order_of_their_ids() -> None:
    placement, found = place(profile_of(np.zeros((1, 4, 4), dtype=np.int64)), 2)
    assert placement.layers == [[0, 1, 2, 3]]
    assert found["exact"] is True
    assert found_fraction(found) == 1.0


def test_placement_by_hand() -> None:
    # 0-3 and 1-2 work together; ids in a slot rise, and device 0 has expert 0
    placement, found = place(profile_of(symmetric(1, 4, [1, 0, 9, 7, 0, 2])), 2, load_cap=None)
    assert placement == Placement(devices=2, nodes=1, factors=(2,), layers=[[0, 3, 1, 2]])
    layer = {
        "placed": figures(16 / 19, 21 / 19),
        "contiguous": figures(3 / 19, 20 / 19),
        "bound": figures(16 / 19, 1.0),  # the pairs 0-3 and 1-2 are the best of their experts
        "exact": True,
        "cut_short": False,
        "load_cap": None,
        "gap": 0.0,
    }
    uniform = {
        "load_max_over_mean": 1.0, "intra_device_fraction": 1 / 3, "distinct_devices": 5 / 3, "remote_copies": 5 / 6,
    }  # fmt: skip
    means = {name: layer[name] for name in ("placed", "contiguous", "bound", "exact", "gap")}
    lists = {
        "uniform": pytest.approx(uniform),
        "objective": "pairs",
        "load_cap": None,
        "other_caps": {},
        "cut_short": [],
        "layers": [layer],
    }
    assert found == means | lists


def figures(inside: float, load: float) -> Any:
    """Of a layer on two devices; a token has two experts."""
    return pytest.approx(
        {
            "intra_device_fraction": inside,
            "distinct_devices": 2 - inside,
            "remote_copies": (2 - inside) / 2,
            "load_max_over_mean": load,
        }
    )


def test_7_experts_on_2_devices_leave_one_slot_empty() -> None:
    placement, _ = place(random_profile(1, 7, seed=1), 2)
    assert placement.layers[0].count(-1) == 1
    assert sorted(len(group) for group in groups(placement, 0)) == [3, 4]
    assert sorted(expert for group in groups(placement, 0) for expert in group) == list(range(7))


@given(seed=st.integers(0, 2**32), num_experts=st.integers(33, 40), devices=st.integers(2, 9))
@settings(max_examples=25)
def test_a_placement_is_never_worse_than_the_order_of_ids(seed: int, num_experts: int, devices: int) -> None:
    profile = random_profile(1, num_experts, seed)
    placement, found = place(profile, devices, load_cap=None, seed=seed % 1000)
    assert found["exact"] is False
    assert found["gap"] > 0
    inside = [found[name]["intra_device_fraction"] for name in ("contiguous", "placed", "bound")]
    assert inside == sorted(inside)
    by_id = Placement.contiguous(num_experts, devices, 1)
    sizes = [sorted(map(len, groups(one, 0))) for one in (placement, by_id)]
    assert sizes[0] == sizes[1]
    assert Placement.model_validate(placement.model_dump()) == placement


@pytest.mark.parametrize(("num_experts", "devices"), [(16, 2), (16, 4), (60, 8), (64, 8)])
def test_planted_groups_are_found(num_experts: int, devices: int) -> None:
    random = np.random.default_rng(0)
    by_id = Placement.contiguous(num_experts, devices, 1)
    device_E = np.array(by_id.device_of_expert(0))[random.permutation(num_experts)]
    noise = symmetric(1, num_experts, random.integers(0, 5, num_experts * (num_experts - 1) // 2))[0]
    counts = noise + 100 * (device_E[:, None] == device_E[None, :])
    placement, _ = place(profile_of(counts), devices, load_cap=None)
    planted = {tuple(np.flatnonzero(device_E == device).tolist()) for device in range(devices)}
    assert {tuple(group) for group in groups(placement, 0)} == planted


def test_the_same_seed_gives_the_same_placement() -> None:
    profile = random_profile(2, 24, seed=0)
    first, second = place(profile, 4, seed=3), place(profile, 4, seed=3)
    assert first == second
    other, _ = place(profile, 4, seed=4)
    assert fraction_of(other, profile) == pytest.approx(fraction_of(first[0], profile), rel=0.02)


def fraction_of(placement: Placement, profile: Profile) -> float:
    layers = range(profile.num_layers)
    return float(np.mean([fraction_inside(profile.counts[n], placement.device_of_expert(n)) for n in layers]))


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
    placement, found = place(profile_of(LAYER_0), devices, load_cap=None)
    assert groups(placement, 0) == groups_of_experts
    # four digits are printed: specs/c2r.md 5.5
    assert found["placed"]["intra_device_fraction"] == pytest.approx(best, abs=5e-5)
    assert found["contiguous"]["intra_device_fraction"] == pytest.approx(by_id, abs=5e-5)


@published
@pytest.mark.parametrize(("devices", "best", "by_id", "load"), [(2, 0.7316, 0.4155, 1.036), (4, 0.4779, 0.1299, 1.109)])
def test_published_layers(devices: int, best: float, by_id: float, load: float) -> None:
    counts = np.load(DATA / "llama_moe_collaboration.npz")["base"]
    reference = json.loads((DATA / "placement_reference.json").read_text())[f"base/D{devices}"]
    placement, found = place(profile_of(counts), devices, load_cap=None)
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
    started = time.perf_counter()
    _, found = place(profile_of(counts), devices, load_cap=None)
    assert time.perf_counter() - started < 1
    assert found["exact"] is True
    assert [found_fraction(found, i) for i in range(32)] == pytest.approx(reference["best"], abs=1e-12)


@published
@pytest.mark.parametrize("devices", [2, 4])
def test_published_layers_under_a_cap(devices: int) -> None:
    """Against every partition; where none is within the cap, against those with the smallest load there is."""
    counts = np.load(DATA / "llama_moe_collaboration.npz")["topt_1"]
    profile = profile_of(counts)
    placement, found = place(profile, devices)
    assert found["exact"] is True
    everything = sorted(set(permutations(sorted(list(range(devices)) * (8 // devices)))))
    everything = [one for one in everything if all(one.index(d) < one.index(d + 1) for d in range(devices - 1))]
    assert len(everything) == {2: 35, 4: 105}[devices]
    others = {}
    for layer in range(32):
        loads = [device_load(profile.load[layer], one, devices).max() for one in everything]
        cap = max(min(loads), 1.1)
        others |= {layer: pytest.approx(cap)} if cap > 1.1 else {}
        best = max(
            fraction_inside(counts[layer], one)
            for one, load in zip(everything, loads, strict=True)
            if load <= cap + 1e-12
        )
        assert found_fraction(found, layer) == best
        held = device_load(profile.load[layer], placement.device_of_expert(layer), devices).max()
        assert held <= cap + 1e-12
    assert found["other_caps"] == others


@pytest.mark.parametrize(("num_experts", "devices"), [(8, 2), (24, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_no_device_exceeds_a_load_cap_that_can_be_held(seed: int, num_experts: int, devices: int) -> None:
    """The busy experts work with one another: without a cap they lie together, with one they are spread."""
    random = np.random.default_rng(seed)
    load = np.where(np.arange(num_experts) < devices, 90, 10) + random.integers(0, 5, num_experts)
    counts = np.triu(random.integers(0, 3, (num_experts, num_experts)), 1)
    counts[:devices, :devices] = np.triu(np.full((devices, devices), 50), 1)
    profile = Profile((counts + counts.T)[None], load[None].astype(np.int64), top_k=2, about={})
    _, found = place(profile, devices, load_cap=None, seed=seed)
    assert found["placed"]["load_max_over_mean"] > 1.5
    _, capped = place(profile, devices, seed=seed)
    assert (capped["load_cap"], capped["other_caps"]) == (1.1, {})
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
    best = max(fraction_inside(profile.counts[0], devices) for devices in within)
    assert fraction_inside(profile.counts[0], placement.device_of_expert(0)) == best


@pytest.mark.parametrize(("num_experts", "devices"), [(4, 2), (64, 32)])
def test_the_smallest_cap_takes_the_place_of_one_that_cannot_be_held(num_experts: int, devices: int) -> None:
    """One expert gets more than a device may."""
    load = np.full(num_experts, 10)
    load[1] = 1000
    load[2] = 5  # the one that must lie beside it
    counts = np.ones((num_experts, num_experts), dtype=np.int64) - np.eye(num_experts, dtype=np.int64)
    profile = Profile(counts[None], load[None].astype(np.int64), top_k=2, about={})
    placement, found = place(profile, devices)
    assert found["other_caps"] == {0: pytest.approx(1005 / (load.sum() / devices))}
    device_of = placement.device_of_expert(0)
    assert device_of[1] == device_of[2]
    with pytest.raises(UserError, match=r"--load-cap \(1.1\) cannot be held in layer 0, the smallest found is \d+\.\d"):
        place(profile, devices, strict=True)


def test_devices_of_tokens_are_counted_and_minimised() -> None:
    """Three experts a token: pairs would put 0, 1 together and 2, 3; tokens are better off otherwise."""
    ids = np.array([[0, 1, 4]] * 6 + [[2, 3, 5]] * 6 + [[0, 2, 4]] * 5 + [[1, 3, 5]] * 4, dtype=np.int16)
    profile = counted(ids, 6)
    placement, found = place(profile, 2, objective="distinct-devices", ids_LTK=ids[None], load_cap=None)
    best = min(
        float(np.mean([len({devices[e] for e in token}) for token in ids]))
        for devices in set(permutations([0, 0, 0, 1, 1, 1]))
    )
    assert found["placed"]["distinct_devices"] == pytest.approx(best)
    assert found["placed"]["remote_copies"] == pytest.approx(best / 2)
    assert found["bound"]["distinct_devices"] <= best
    assert found["exact"] is True
    assert Placement.model_validate(placement.model_dump()) == placement


def counted(ids_TK: NDArray[np.int16], num_experts: int) -> Profile:
    pairs = np.zeros((1, num_experts, num_experts), dtype=np.int64)
    for token in ids_TK:
        pairs[0][np.ix_(token, token)] += 1
    return Profile.of_pairs(pairs, ids_TK.shape[1], {})


def test_devices_of_tokens_need_the_tokens() -> None:
    with pytest.raises(UserError, match="--objective distinct-devices needs the experts of every token"):
        place(random_profile(1, 4, 0), 2, objective="distinct-devices")


def test_a_time_limit_ends_the_search_and_is_said() -> None:
    _, found = place(random_profile(2, 64, 0), 8, time_limit=0.0)
    assert found["cut_short"] == [0, 1]
    _, found = place(random_profile(2, 64, 0), 8, time_limit=60.0)
    assert found["cut_short"] == []


def test_replicas_take_load_off_the_busiest() -> None:
    profile = Profile(np.zeros((1, 4, 4), dtype=np.int64), np.array([[60, 20, 10, 10]]), top_k=1, about={})
    _, found = place(profile, 2, load_cap=None, replicas=1)
    # expert 0 beside 1; half of 0's tokens go to the other device: 50 and 50 of 100
    assert found["placed"]["load_max_over_mean"] == pytest.approx(1.6)
    assert found["load_with_replicas"] == pytest.approx(1.0)


@pytest.mark.parametrize(("num_experts", "devices"), [(16, 4), (24, 2)])
def test_what_is_said_to_be_proven_for_random_counts_is(num_experts: int, devices: int) -> None:
    _, found = place(random_profile(1, num_experts, seed=1), devices, load_cap=None)
    assert (found["exact"], found["gap"]) == (True, 0.0)


def test_nodes_come_before_devices() -> None:
    """0-1-2-3 and 4-5-6-7 belong on a node each, though the closest pairs, 3-4 and 0-7, lie across."""
    counts = np.zeros((8, 8), dtype=np.int64)
    counts[:4, :4] = counts[4:, 4:] = 10
    counts[3, 4] = counts[4, 3] = counts[0, 7] = counts[7, 0] = 25
    counts[range(8), range(8)] = 0
    placement, found = place(profile_of(counts), 4, nodes=2, load_cap=None)
    on_node_0 = {expert for expert, device in enumerate(placement.device_of_expert(0)) if device < 2}
    assert on_node_0 == {0, 1, 2, 3}
    assert found["placed"]["intra_node_fraction"] == pytest.approx(240 / 340)
    assert found["bound"]["intra_node_fraction"] >= 240 / 340
    together, _ = place(profile_of(counts), 4, load_cap=None)
    assert {frozenset(group) for group in groups(together, 0)} >= {frozenset({3, 4}), frozenset({0, 7})}


def test_a_placement_is_looked_at_on_other_text() -> None:
    """0-1 and 2-3 work together here, 0-2 and 1-3 there, in the proportion 3 to 1."""
    here, there = np.zeros((4, 4), dtype=np.int64), np.zeros((4, 4), dtype=np.int64)
    here[0, 1] = here[1, 0] = here[2, 3] = here[3, 2] = 5
    there[0, 2] = there[2, 0] = there[1, 3] = there[3, 1] = 3
    there[0, 1] = there[1, 0] = 2
    placement, _ = place(profile_of(here[None]), 2)
    found = on_other_text(placement, profile_of(there[None]), Path("other.npz"))
    assert found["placed"]["intra_device_fraction"] == pytest.approx(2 / 8)
    assert found["placed"] == found["contiguous"]
    with pytest.raises(
        UserError, match=r"--check other.npz has 1 layers of 8 experts, the placement 1 layers of 4 experts; profile"
    ):
        on_other_text(placement, random_profile(1, 8, 0), Path("other.npz"))


@pytest.mark.parametrize(("text", "cap"), [("none", None), ("1.25", 1.25)])
def test_caps_are_numbers_or_none(text: str, cap: float | None) -> None:
    assert parse_cap(text) == cap
    with pytest.raises(UserError, match=r"--load-cap \(some\) must be a number or none"):
        parse_cap("some")


@pytest.mark.parametrize("cap", [0.9, float("nan"), float("inf")])
def test_a_cap_that_means_nothing_is_refused(cap: float) -> None:
    with pytest.raises(UserError, match=r"--load-cap \((0.9|nan|inf)\) must be at least 1"):
        place(random_profile(1, 4, 0), 2, load_cap=cap)
