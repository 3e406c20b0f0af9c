"""What placements cost, by hand and by property, and bounds against every partition."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.c2r.locality import (
    Counted,
    bound_layer,
    describe_layer,
    device_load,
    distinct_groups,
    fraction_inside,
    least_distinct,
    most_inside,
    replicated_load,
    uniform_layer,
)
from ep_engine.placement import Placement
from tests.counts import COUNTS, DATA, LOAD, many_counts, published


@pytest.mark.parametrize(
    ("devices", "fraction"),
    [([0, 0, 1, 1], 5 / 15), ([0, 1, 0, 1], 4 / 15), ([0, 1, 1, 0], 6 / 15), ([0] * 4, 1.0), ([0, 1, 2, 3], 0.0)],
)
def test_intra_device_fraction_by_hand(devices: list[int], fraction: float) -> None:
    assert fraction_inside(COUNTS, devices) == pytest.approx(fraction, rel=1e-15)
    assert fraction_inside(COUNTS + 100 * np.eye(4, dtype=np.int64), devices) == pytest.approx(fraction, rel=1e-15)


def test_without_pairs_everything_is_inside() -> None:
    assert fraction_inside(np.zeros((3, 3), dtype=np.int64), [0, 1, 2]) == 1.0


@given(counts=many_counts(), data=st.data())
def test_a_token_of_two_experts_visits_two_devices_less_the_fraction(
    counts: NDArray[np.int64], data: st.DataObject
) -> None:
    layer = counts[0]
    devices = data.draw(st.lists(st.integers(0, 3), min_size=len(layer), max_size=len(layer)))
    tokens = [(i, j) for i in range(len(layer)) for j in range(i) for _ in range(layer[i, j])]
    if tokens:
        visited = sum(len({devices[i], devices[j]}) for i, j in tokens) / len(tokens)
        assert visited == pytest.approx(2 - fraction_inside(layer, devices))


def test_device_load_by_hand() -> None:
    assert LOAD.tolist() == [9, 11, 4, 6]
    assert device_load(LOAD, [0, 0, 1, 1], 2).tolist() == pytest.approx([20 / 15, 10 / 15])
    assert device_load(LOAD, [0, 0, 2, 2], 4).tolist() == pytest.approx([8 / 3, 0.0, 4 / 3, 0.0])  # two hold none
    assert device_load(np.zeros(4, dtype=np.int64), [0, 0, 1, 1], 2).tolist() == [0.0, 0.0]


def test_a_layer_is_described_by_hand() -> None:
    of = Counted(COUNTS, LOAD, 2)
    assert describe_layer(of, [0, 0, 1, 1], 2) == pytest.approx(
        {"intra_device_fraction": 1 / 3, "load_max_over_mean": 4 / 3, "distinct_devices": 5 / 3, "remote_copies": 5 / 6}
    )
    on_nodes = describe_layer(of._replace(top_k=3), [0, 1, 2, 3], 4, nodes=2)
    assert on_nodes == pytest.approx(
        {"intra_device_fraction": 0.0, "load_max_over_mean": 11 / 7.5, "intra_node_fraction": 1 / 3}
    )
    seen = describe_layer(of._replace(ids_TK=np.array([[0, 1], [0, 2]], dtype=np.int16)), [0, 1, 2, 3], 4, nodes=2)
    assert (seen["distinct_devices"], seen["distinct_nodes"], seen["remote_copies"]) == (2.0, 1.5, 1.5)


@given(data=st.data(), tokens=st.integers(1, 8), top_k=st.integers(1, 5))
def test_distinct_groups_are_those_of_a_set(data: st.DataObject, tokens: int, top_k: int) -> None:
    groups = data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
    ids = np.array([data.draw(st.permutations(range(6)))[:top_k] for _ in range(tokens)], dtype=np.int16)
    expected = np.mean([len({groups[e] for e in token}) for token in ids])
    assert distinct_groups(ids, groups) == pytest.approx(expected)


@given(counts=many_counts(), devices=st.integers(1, 4))
def test_no_partition_has_more_inside_than_the_bound(counts: NDArray[np.int64], devices: int) -> None:
    layer = counts[0][:6, :6]
    experts = len(layer)
    devices = min(devices, experts)
    (bound,) = most_inside(layer, -(-experts // devices) * devices, [devices])
    by_id = Placement.contiguous(experts, devices, 1).device_of_expert(0)
    best = max(fraction_inside(layer, one) for one in set(permutations(by_id)))
    assert best <= bound + 1e-9 <= 1 + 1e-9
    partners = np.sort(layer, axis=1)[:, ::-1][:, : -(-experts // devices) - 1].sum()  # of every expert the best
    assert bound <= partners / max(layer.sum(), 1) + 1e-9 or layer.sum() == 0


def test_the_bound_is_met_where_groups_are_strangers() -> None:
    counts = np.kron(np.eye(4, dtype=np.int64), np.ones((3, 3), dtype=np.int64))
    assert most_inside(counts, 12, [4, 2]) == pytest.approx([1.0, 1.0])
    mixed = counts + np.kron(np.ones((4, 4), dtype=np.int64), np.ones((3, 3), dtype=np.int64))
    inside = fraction_inside(mixed, [d for d in range(4) for _ in range(3)])
    assert most_inside(mixed, 12, [4])[0] == pytest.approx(inside)  # here the eigenvalues say it all


@given(data=st.data(), top_k=st.integers(1, 6), groups=st.integers(1, 4), slots=st.integers(1, 4))
def test_no_tokens_need_fewer_groups_than_their_pairs_say(
    data: st.DataObject, top_k: int, groups: int, slots: int
) -> None:
    experts = groups * slots
    top_k = min(top_k, experts)
    tokens = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(data.draw(st.integers(1, 4)))]
    groups_of = [[expert // slots for expert in token] for token in tokens]
    inside = np.mean([sum(a == b for i, a in enumerate(of) for b in of[:i]) for of in groups_of])
    pairs = top_k * (top_k - 1) / 2
    distinct = np.mean([len(set(of)) for of in groups_of])
    assert least_distinct(inside / pairs if pairs else 1.0, top_k, groups, slots) <= distinct + 1e-9


def test_least_distinct_by_hand() -> None:
    assert least_distinct(0.25, 2, 4, 2) == pytest.approx(1.75)  # 2 - f
    assert least_distinct(1.0, 8, 64, 4) == 2.0  # eight experts fill two devices of four
    assert least_distinct(12 / 28, 8, 64, 4) == 2.0  # which is all the pairs that need be inside
    assert least_distinct(0.0, 8, 64, 4) == 8.0


# Experts, top_k, devices: remote copies a token where all sets are as likely, specs/c2r.md section 4.
UNIFORM = {
    (8, 2, 2): 0.786, (8, 2, 4): 1.393, (16, 4, 8): 3.150, (60, 4, 4): 2.083, (60, 6, 8): 3.972, (60, 8, 16): 6.332,
    (64, 8, 4): 2.744, (64, 8, 8): 4.753, (128, 6, 16): 4.898, (256, 8, 8): 4.633, (256, 8, 16): 6.116,
}  # fmt: skip


@pytest.mark.parametrize(("experts", "top_k", "devices"), list(UNIFORM), ids=str)
def test_uniform_routing_costs_what_the_formula_and_a_draw_say(experts: int, top_k: int, devices: int) -> None:
    found = uniform_layer(experts, top_k, devices)
    assert found["remote_copies"] == pytest.approx(UNIFORM[experts, top_k, devices], abs=5e-4)  # as printed
    random = np.random.default_rng(0)
    ids = np.argpartition(random.random((20_000, experts)), top_k - 1, axis=1)[:, :top_k].astype(np.int16)
    home = Placement.contiguous(experts, devices, 1).device_of_expert(0)
    assert distinct_groups(ids, home) == pytest.approx(found["distinct_devices"], rel=0.01)
    inside = np.mean([[home[a] == home[b] for a, b in zip(ids[:, 0], ids[:, i], strict=True)] for i in range(1, top_k)])
    assert inside == pytest.approx(found["intra_device_fraction"], abs=0.01)


def test_uniform_routing_over_nodes() -> None:
    found = uniform_layer(64, 6, 8, nodes=2)
    assert found["distinct_nodes"] == pytest.approx(uniform_layer(64, 6, 2)["distinct_devices"])
    assert found["intra_node_fraction"] == pytest.approx(uniform_layer(64, 6, 2)["intra_device_fraction"])


def test_bounds_name_what_the_figures_name() -> None:
    of = Counted(COUNTS, LOAD, 2)
    for nodes in (1, 2):
        assert bound_layer(of, 2 * nodes, nodes).keys() == describe_layer(of, [0, 0, 1, 1], 2 * nodes, nodes).keys()


@given(seed=st.integers(0, 1000), copies=st.integers(0, 6))
def test_replicas_never_make_the_mean_device_less_busy(seed: int, copies: int) -> None:
    load = np.random.default_rng(seed).integers(1, 100, 6)
    home = [0, 0, 1, 1, 2, 2]
    assert replicated_load(load, home, 3, 0) == pytest.approx(device_load(load, home, 3).max())
    assert 1 - 1e-9 <= replicated_load(load, home, 3, copies) <= 3
    assert replicated_load(load, home, 3, 12) == pytest.approx(1.0)  # every expert is everywhere


@published
def test_published_placements_cost_what_the_specification_says() -> None:
    counts = np.load(DATA / "llama_moe_collaboration.npz")["base"]
    for devices, mean in ((2, 0.4155), (4, 0.1299)):
        by_id = Placement.contiguous(8, devices, 32)
        fractions = [fraction_inside(counts[i], by_id.device_of_expert(i)) for i in range(32)]
        assert np.mean(fractions) == pytest.approx(mean, abs=5e-5)  # four digits are printed
