"""Made routing has the groups that it says, and others' placements are compared as they should be."""

import numpy as np
import pytest

from benchmarks.planted import Planted
from ep_engine.c2r.locality import distinct_groups, fraction_inside

pytest.importorskip("pymetis", reason="a peer of benchmarks/placement.py that only requirements-dev.txt installs")
from benchmarks.placement import large, noisy
from benchmarks.placement_peers import PEERS


@pytest.mark.parametrize(("experts", "devices", "nodes"), [(24, 4, 1), (26, 4, 1), (32, 8, 2)])
def test_planted_groups_are_equal_and_seen_in_the_tokens(experts: int, devices: int, nodes: int) -> None:
    shape = Planted(experts, 4, devices, nodes, bonus=np.inf)
    ids_LTK, counted, hidden = shape.layers(2, 500, seed=1)
    assert ids_LTK.shape == (2, 500, 4)
    assert (np.diff(np.sort(ids_LTK, axis=2), axis=2) > 0).all()
    assert counted.load.sum() == ids_LTK.size
    for layer in range(2):
        assert sorted(np.bincount(hidden[layer])) == sorted(map(len, np.array_split(range(experts), devices)))
        homes = -(-4 // (experts // devices))
        assert distinct_groups(ids_LTK[layer], hidden[layer]) <= homes
        assert counted.counts[layer][3, 5] == sum({3, 5} <= set(token) for token in ids_LTK[layer].tolist())
    noise, _, _ = Planted(experts, 4, devices, nodes, bonus=0.0).layers(1, 500, seed=1)
    assert distinct_groups(noise[0], hidden[0]) > 2


@pytest.mark.parametrize("experts", [24, 26])
@pytest.mark.parametrize("name", list(PEERS))
def test_peers_of_placement_make_equal_groups_and_find_plain_ones(name: str, experts: int) -> None:
    _, counted, hidden = Planted(experts, 4, 4, bonus=6.0).layers(1, 2000, seed=2)
    found = PEERS[name](counted.counts[0], 4)
    assert sorted(np.bincount(found)) == sorted(map(len, np.array_split(range(experts), 4)))
    inside = fraction_inside(counted.counts[0], found)
    assert inside <= fraction_inside(counted.counts[0], hidden[0]) + 1e-9
    assert inside > 0.8


def test_placement_ours_is_compared_on_every_layer() -> None:
    found = noisy(26, 2, 1000, 1.0)
    assert {found[name]["layers_no_worse"] for name in PEERS} == {2}
    assert found["contiguous"] < found["ours"] <= found["bound"]
    planted = large(1, 2000, devices=16, nodes=4)
    assert planted["metis_load_max_over_mean"] >= 1
    assert planted["layers_no_worse_than_metis"] in (0, 1)
    assert planted["hidden"]["both"] == pytest.approx(planted["hidden"]["devices"] + 8 * planted["hidden"]["nodes"])
    assert planted["bound"]["devices"] <= planted["ours"]["devices"] <= planted["contiguous"]["devices"]
