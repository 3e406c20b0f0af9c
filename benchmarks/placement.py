"""How good are placements, and how long do they take, beside METIS, a spectral cut and the greedy of Occult?

    python -m benchmarks.placement [--layers 32] [--large-layers 58] [--large-tokens 65536]
        [--profiles FILE ...] [--json OUT]

Made routing with hidden groups (planted.py), counted as `ep-engine profile` would. All peers get equal groups; ours is
without a cap on the load where it is compared with them, and once with it.

    noiseless    60 and 64 experts, 8 devices: are the hidden groups found?
    noisy        the same between noise and with busy experts: pairs inside devices, on every layer
    large        256 experts, 64 devices on 8 nodes, k 8: the devices and nodes of a token, from the tokens themselves,
                 with a cap of 1.1, beside METIS that cuts nodes first and then devices, and has no cap
    large, free  the same where the groups are hardly to be seen, on a few layers, without a cap for either
    trained      as noisy, on profiles of models (`ep-engine profile`), such as those that the other benchmarks train
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.placement_peers import PEERS, recursive_metis
from benchmarks.planted import Planted
from benchmarks.timing import write_results
from ep_engine.c2r.collaboration import Profile, read_profile
from ep_engine.c2r.locality import device_load, distinct_groups, fraction_inside
from ep_engine.c2r.place import LOAD_CAP, NODE_WEIGHT, place
from ep_engine.placement import Placement

DEVICES = 8
FAINT = (1.0, 2.0)
FEW = 4  # layers
BONUSES = (0.5, 1.0, 2.0, 3.0)  # from routing that is nearly noise to groups that are plain to see


def noiseless(experts: int, layers: int, tokens: int) -> dict[str, Any]:
    """Layers on which the hidden groups, or as good ones, were found."""
    _, counted, hidden = Planted(experts, 6, DEVICES, bonus=np.inf).layers(layers, tokens, seed=0)
    started = time.perf_counter()
    placement, _ = place(counted, DEVICES, load_cap=None)
    seconds = time.perf_counter() - started
    found = sum(_as_sets(placement.device_of_expert(layer)) == _as_sets(hidden[layer]) for layer in range(layers))
    return {"layers": layers, "found": found, "seconds": seconds}


def noisy(experts: int, layers: int, tokens: int, bonus: float) -> dict[str, Any]:
    """Hidden groups beside noise: what they have, and what `beside_peers` finds."""
    _, counted, hidden = Planted(experts, 6, DEVICES, bonus=bonus).layers(layers, tokens, seed=100)
    inside = [fraction_inside(counted.counts[n], hidden[n]) for n in range(layers)]
    return {"hidden": float(np.mean(inside)), **beside_peers(counted)}


def beside_peers(counted: Profile) -> dict[str, Any]:
    """Pairs inside devices for ours and the peers, and on how many layers ours is no worse."""
    layers = counted.num_layers
    started = time.perf_counter()
    placement, found = place(counted, DEVICES, load_cap=None)
    seconds = time.perf_counter() - started
    ours = [fraction_inside(counted.counts[layer], placement.device_of_expert(layer)) for layer in range(layers)]
    _, capped = place(counted, DEVICES)
    result: dict[str, Any] = {
        "layers": layers,
        "seconds": seconds,
        "ours": float(np.mean(ours)),
        "contiguous": found["contiguous"]["intra_device_fraction"],
        "bound": found["bound"]["intra_device_fraction"],
        "capped": capped["placed"]["intra_device_fraction"],
        "load_max_over_mean": {"free": found["placed"]["load_max_over_mean"], "capped": max_load(capped)},
    }
    for name, peer in PEERS.items():
        started = time.perf_counter()
        theirs = [fraction_inside(pairs, peer(pairs, DEVICES)) for pairs in counted.counts]
        result[name] = {
            "inside": float(np.mean(theirs)),
            "seconds": time.perf_counter() - started,
            "layers_no_worse": sum(a >= b for a, b in zip(ours, theirs, strict=True)),
        }
    return result


def large(
    layers: int,
    tokens: int,
    *,
    bonus: float = 3.0,
    load_cap: float | None = LOAD_CAP,
    devices: int = 64,
    nodes: int = 8,
) -> dict[str, Any]:
    """What ours, METIS, the order of ids and the hidden groups cost: devices and nodes of a token."""
    shape = Planted(256, 8, devices, nodes, bonus=bonus)
    ids_LTK, counted, hidden = shape.layers(layers, tokens, seed=200)
    started = time.perf_counter()
    given: dict[str, Any] = {"objective": "distinct-devices", "ids_LTK": ids_LTK, "load_cap": load_cap}
    placement, found = place(counted, devices, nodes=nodes, **given)
    seconds = time.perf_counter() - started
    by_id = Placement.contiguous(256, devices, 1, nodes=nodes).device_of_expert(0)
    started = time.perf_counter()
    metis = [recursive_metis(pairs, devices, nodes) for pairs in counted.counts]
    metis_seconds = time.perf_counter() - started
    of = {
        "ours": [placement.device_of_expert(layer) for layer in range(layers)],
        "metis": metis,
        "contiguous": [by_id] * layers,
        "hidden": hidden,
    }
    cost = {name: [_cost(ids_LTK[n], held[n], devices, nodes) for n in range(layers)] for name, held in of.items()}
    both = {name: np.array([one["both"] for one in costs]) for name, costs in cost.items()}
    gain = (both["contiguous"] - both["ours"]) / (both["contiguous"] - both["hidden"])
    return {
        "seconds": seconds,
        "metis_seconds": metis_seconds,
        **{
            name: {key: float(np.mean([one[key] for one in costs])) for key in ("devices", "nodes", "both")}
            for name, costs in cost.items()
        },
        "bound": {"devices": found["bound"]["distinct_devices"], "nodes": found["bound"]["distinct_nodes"]},
        "load_max_over_mean": max_load(found),
        "metis_load_max_over_mean": max(
            float(device_load(counted.load[n], metis[n], devices).max()) for n in range(layers)
        ),
        "other_caps": len(found["other_caps"]),
        "layers_no_worse_than_metis": int((both["ours"] <= both["metis"]).sum()),
        "layers_no_worse_in_devices": sum(
            a["devices"] <= b["devices"] for a, b in zip(cost["ours"], cost["metis"], strict=True)
        ),
        "least_share_of_planted_gain": float(gain.min()),
    }


def max_load(found: dict[str, Any]) -> float:
    """Of all layers."""
    return max(layer["placed"]["load_max_over_mean"] for layer in found["layers"])


def _cost(ids_TK: NDArray[np.int16], device_E: list[int], devices: int, nodes: int) -> dict[str, float]:
    found = {
        "devices": distinct_groups(ids_TK, device_E),
        "nodes": distinct_groups(ids_TK, [device * nodes // devices for device in device_E]),
    }
    return found | {"both": found["devices"] + NODE_WEIGHT * found["nodes"]}


def _as_sets(device_E: list[int]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.array(device_E) == device).tolist()) for device in set(device_E)}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a layer")
    parser.add_argument("--large-layers", type=int, default=58)
    parser.add_argument("--large-tokens", type=int, default=65_536)
    parser.add_argument("--profiles", type=Path, nargs="*", default=[], help="of trained models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for experts in (60, 64):
        results[f"noiseless, {experts} experts"] = noiseless(experts, args.layers, args.tokens)
        for bonus in BONUSES:
            title = f"noisy, {experts} experts, bonus {bonus}"
            results[title] = noisy(experts, args.layers, args.tokens, bonus)
    if args.large_layers:
        results["large"] = large(args.large_layers, args.large_tokens)
        for bonus in FAINT:
            few = min(args.large_layers, FEW)
            results[f"large, free, bonus {bonus}"] = large(few, args.large_tokens, bonus=bonus, load_cap=None)
    for path in args.profiles:
        counted = read_profile(path)
        results[f"trained, {counted.num_experts} experts, k {counted.top_k}"] = beside_peers(counted)
    setting = {key: value for key, value in vars(args).items() if key not in ("json", "profiles")}
    setting |= {"load_cap": LOAD_CAP}
    write_results(args.json, __doc__.splitlines()[0], setting | {"node_weight": NODE_WEIGHT}, results)


if __name__ == "__main__":
    main()
