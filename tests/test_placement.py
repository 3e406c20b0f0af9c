"""Slots, devices and cuts by hand; what a placement file may hold."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.errors import UserError
from ep_engine.placement import Cut, Placement, prime_factors, read_placement


def test_contiguous_by_hand() -> None:
    placement = Placement.contiguous(8, 4, 2)
    assert placement.layers == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    assert (placement.experts_of_layer, placement.slots_per_device(0), placement.factors) == ([8, 8], 2, (2, 2))
    assert placement.device_of_expert(1) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_uneven_experts_leave_the_last_slots_of_some_devices_empty() -> None:
    placement = Placement.contiguous(7, 3, 1)
    assert placement.layers == [[0, 1, 2, 3, 4, -1, 5, 6, -1]]
    assert placement.slot_of_expert(0) == [0, 1, 2, 3, 4, 6, 7]
    assert placement.device_of_expert(0) == [0, 0, 0, 1, 1, 2, 2]


def test_60_experts_on_8_devices_are_spread_evenly() -> None:
    placement = Placement.contiguous(60, 8, 1)
    devices = placement.device_of_expert(0)
    assert [devices.count(device) for device in range(8)] == [8, 7, 8, 7, 8, 7, 8, 7]
    assert (placement.slots_per_device(0), placement.layers[0].count(-1)) == (8, 4)
    assert placement.layers[0][:17] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, -1, 15]


@given(data=st.data())
def test_contiguous_is_even_and_in_the_order_of_ids(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 70))
    devices = data.draw(st.integers(1, num_experts))
    nodes = data.draw(st.sampled_from([n for n in range(1, devices + 1) if devices % n == 0]))

    placement = Placement.contiguous(num_experts, devices, 1, nodes=nodes)

    held = placement.device_of_expert(0)
    assert [expert for expert in placement.layers[0] if expert >= 0] == list(range(num_experts))
    assert held == sorted(held)
    counts = [held.count(device) for device in range(devices)]
    assert max(counts) - min(counts) <= 1
    for ep_size in {1, nodes, devices}:
        assert placement.cut(ep_size).slots_per_rank * ep_size == len(placement.layers[0])


@given(data=st.data())
def test_slots_and_experts_are_inverse(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 20))
    devices = data.draw(st.integers(1, num_experts))
    num_slots = devices * -(-num_experts // devices)
    slots = data.draw(st.permutations([*range(num_experts), *[-1] * (num_slots - num_experts)]))

    placement = Placement(devices=devices, factors=(devices,), layers=[slots])

    slot_of_expert, device_of_expert = placement.slot_of_expert(0), placement.device_of_expert(0)
    assert [slots[slot] for slot in slot_of_expert] == list(range(num_experts))
    for expert, device in enumerate(device_of_expert):
        first = device * placement.slots_per_device(0)
        assert expert in slots[first : first + placement.slots_per_device(0)]


# (experts, devices, nodes) -> {ranks: (slots per rank, group sizes of slots, group sizes of ranks)}, innermost first
CUTS: dict[tuple[int, int, int], dict[int, tuple[int, list[int], list[int]]]] = {
    (8, 4, 1): {1: (8, [2, 4, 8], [1]), 2: (4, [2, 4], [2]), 4: (2, [2], [2, 4])},
    (12, 6, 1): {1: (12, [2, 6, 12], [1]), 2: (6, [2, 6], [2]), 6: (2, [2], [3, 6])},
    (12, 6, 3): {1: (12, [2, 4, 12], [1]), 3: (4, [2, 4], [3]), 6: (2, [2], [2, 6])},
    (8, 1, 1): {1: (8, [8], [1])},
    (7, 2, 1): {1: (8, [4, 8], [1]), 2: (4, [4], [2])},
    (8, 8, 1): {1: (8, [1, 2, 4, 8], [1]), 4: (2, [1, 2], [2, 4]), 8: (1, [1], [2, 4, 8])},
}


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_cuts_by_hand(sizes: tuple[int, int, int]) -> None:
    num_experts, devices, nodes = sizes
    placement = Placement.contiguous(num_experts, devices, 1, nodes=nodes)
    for ep_size, (slots_per_rank, of_slots, of_ranks) in CUTS[sizes].items():
        assert placement.cut(ep_size) == Cut(ep_size, slots_per_rank, of_slots, of_ranks)


def test_levels_with_one_child_are_no_levels() -> None:
    placement = Placement(devices=4, nodes=1, factors=(1, 4, 1), layers=[[0, 1, 2, 3]])
    assert placement.cut(1) == Cut(1, 4, [1, 4], [1])
    assert placement.cut(4) == Cut(4, 1, [1], [4])


@pytest.mark.parametrize(("devices", "nodes", "factors"), [(1, 1, (1,)), (12, 1, (2, 2, 3)), (12, 6, (2, 3, 2))])
def test_the_tree_begins_with_the_nodes(devices: int, nodes: int, factors: tuple[int, ...]) -> None:
    assert Placement.contiguous(12, devices, 1, nodes=nodes).factors == factors


@pytest.mark.parametrize(("number", "factors"), [(1, ()), (2, (2,)), (12, (2, 2, 3)), (97, (97,)), (60, (2, 2, 3, 5))])
def test_prime_factors_by_hand(number: int, factors: tuple[int, ...]) -> None:
    assert prime_factors(number) == factors


@pytest.mark.parametrize("devices", [0, 9, -1])
def test_experts_that_do_not_fit_are_refused(devices: int) -> None:
    with pytest.raises(UserError, match=rf"^8 experts do not fit {devices} devices, .* at least one; use fewer"):
        Placement.contiguous(8, devices, 1)


def test_nodes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"^nodes \(3\) must divide devices \(4\); give every node the same number$"):
        Placement.contiguous(8, 4, 1, nodes=3)


@pytest.mark.parametrize("ep_size", [2, 4, 5, 12])
def test_size_that_is_no_cut_is_refused(ep_size: int) -> None:
    placement = Placement.contiguous(12, 6, 1, nodes=3)
    with pytest.raises(
        UserError,
        match=rf"^parallel\.expert_parallel_size \({ep_size}\) is no cut of the placement's tree \(3, 2\) of 6 "
        rf"devices; use one of 1, 3, 6, or place for {ep_size} devices$",
    ):
        placement.cut(ep_size)


def test_a_tree_of_many_devices_is_no_deeper_than_the_op_that_sums_along_it() -> None:
    placement = Placement.contiguous(256, 256, 1)
    assert placement.factors == (2, 2, 2, 2, 2, 2, 4)
    assert len(placement.cut(1).group_sizes_of_slots) == 8


def test_every_size_is_offered_once() -> None:
    with pytest.raises(UserError, match="use one of 1, or place for 2 devices"):
        Placement.contiguous(8, 1, 1).cut(2)


def test_saved_placement_comes_back(tmp_path: Path) -> None:
    placement = Placement(
        devices=4, nodes=2, factors=(2, 2), layers=[[3, 1, 0, 2, 4, -1, 5, -1], list(range(6)) + [-1] * 2]
    )
    path = tmp_path / "deep" / "placement.json"
    placement.save(path, exact=True, placed={"intra_device_fraction": 0.7})
    assert read_placement(path) == placement
    assert json.loads(path.read_text())["placed"] == {"intra_device_fraction": 0.7}  # kept beside it, for people
    assert [file.name for file in path.parent.iterdir()] == ["placement.json"]


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "expert twice": ({"layers": [[0, 1, 1, 3]]}, r"layer 0 .* each expert once, got \[0, 1, 1, 3\]; place again"),
    "expert missing": ({"layers": [[0, 1, 2, 3], [0, 1, 3, -1]]}, r"layer 1 .* each expert once, got \[0, 1, 3, -1\]"),
    "unknown expert": ({"layers": [[0, 1, 2, 4]]}, "layer 0 .* each expert once"),
    "no expert": ({"layers": [[-1, -1]]}, "layer 0 .* each expert once"),
    "too many slots": (
        {"layers": [[0, 1, 2, 3, -1, -1]]},
        "layer 0 of the placement has 6 slots, 4 experts on 2 devices need 4; place again",
    ),
    "factors": ({"factors": [2, 2]}, r"the factors of a placement \(2, 2\) must multiply to its devices \(2\)"),
    "negative factors": ({"factors": [-2, -1]}, r"the factors of a placement \(-2, -1\) must multiply"),
    "no devices": ({"devices": 0, "factors": [0]}, r"must multiply to its devices \(0\)"),
    "nodes": (
        {"devices": 4, "nodes": 3, "factors": [2, 2]},
        r"nodes \(3\) must be a product of leading factors \(2, 2\)",
    ),
    "no numbers": ({"layers": [["a"]]}, r"layers\.0\.0: .* valid integer"),
    "a key is missing": ({"devices": None}, r"devices\b"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[name]
    path = tmp_path / "placement.json"
    whole = {"devices": 2, "nodes": 1, "factors": [2], "layers": [[0, 1, 2, 3]]}
    path.write_text(json.dumps({key: value for key, value in (whole | change).items() if value is not None}))
    with pytest.raises(UserError, match=rf"^{path}: .*{sentence}"):
        read_placement(path)


def test_layers_may_have_different_numbers_of_experts() -> None:
    placement = Placement.in_order([4, 7, 12], 4, nodes=2)
    assert placement.experts_of_layer == [4, 7, 12]
    assert [placement.slots_per_device(layer) for layer in range(3)] == [1, 2, 3]
    assert placement.device_of_expert(1) == [0, 0, 1, 1, 2, 2, 3]
    assert placement.cut(2, 0) == Cut(2, 2, [1, 2], [2])
    assert placement.cut(2, 2) == Cut(2, 6, [3, 6], [2])


@pytest.mark.parametrize("layers", [[], [[0, 1, 2, 3], []], [[0, 1, 2, 3], [0, 2]], [[0, 1], [0, 1, 2, -1, -1, -1]]])
def test_layers_must_hold_each_of_their_experts_once(layers: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"devices": 2, "factors": [2], "layers": layers}))
    with pytest.raises(UserError, match=rf"^{path}: "):
        read_placement(path)


@pytest.mark.parametrize(
    "content", [b"", b'{"devices": 2', b"\xff\xfe\x00", b"[]"], ids=["empty", "cut short", "no text", "a list"]
)
def test_file_that_is_no_json_is_refused_in_one_clean_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}\b") as refused:
        read_placement(path)
    assert ": :" not in str(refused.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    sentence = r"placement .*none\.json cannot be read \(No such file or directory\); make one with `ep-engine place`"
    with pytest.raises(UserError, match=sentence):
        read_placement(tmp_path / "none.json")
