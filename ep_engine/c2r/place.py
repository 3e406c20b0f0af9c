"""Place: which expert lives on which device, so that experts that work together are together.

Shape letters:  L layers   E experts   D devices   T tokens   K top_k
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ep_engine.c2r.collaboration import Profile
from ep_engine.c2r.locality import Counted, Figures, bound_layer, describe_layer, replicated_load, uniform_layer
from ep_engine.c2r.solver import ANY, Effort, Found, least_room, solve
from ep_engine.config import load_config
from ep_engine.errors import UserError
from ep_engine.model_config import in_words
from ep_engine.placement import Placement, read_placement

Objective = Literal["pairs", "distinct-devices"]
LOAD_CAP = 1.1
NODE_WEIGHT = 8  # links between servers of 8 GPUs carry about an eighth of those inside: 50 beside 450 GB/s
_ROUNDING = 1e-6  # tokens; loads are whole, what a cap allows is not


def place(
    profile: Profile,
    devices: int,
    *,
    nodes: int = 1,
    objective: Objective = "pairs",
    ids_LTK: NDArray[np.int16] | None = None,
    load_cap: float | None = LOAD_CAP,
    strict: bool = False,
    replicas: int = 0,
    seed: int = 0,
    time_limit: float | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Placement, dict[str, Any]]:
    """Find a placement under which tokens find their experts on few devices; layers side by side on all cores.

    Args:
        profile: co-activation counts.
        devices: D, in 1..E; where it does not divide E some devices hold one expert less.
        nodes: of which the devices are parts; the tree of the placement begins with them. Being on one node counts
            NODE_WEIGHT times as much as being on one of its devices.
        objective: what is made best: `pairs`, the share of co-activated pairs inside devices, or `distinct-devices`,
            the devices that hold a token's experts, which is what travels; the two are one for K = 2.
        ids_LTK: experts of tokens, for `distinct-devices`; its figures are reported for either.
        load_cap: most tokens that the experts of a device may get, relative to the mean device, at least 1; None: any
            number. Where no placement is within it, the smallest cap takes its place for which one was found.
        strict: refuse instead.
        replicas: copies of busy experts to report the load for; the placement has none.
        seed: of the search.
        time_limit: seconds; a search that is cut off by it is not repeatable, and the report says so.
        advance: called with the number of layers done.

    Returns:
        The placement and what was found, for each of `layers` and as means over them: the figures of `describe_layer`
        for it (`placed`) and for experts in the order of their ids (`contiguous`), their `bound`, whether the search
        was `exact`, the `gap` to the bound, 0 if it was, and which layers were `cut_short` or hold `other_caps`; and
        what the figures would be if all sets of experts were as likely (`uniform`).

    Raises:
        UserError: more devices than experts, nodes that do not divide the devices, a cap below 1, a missing trace, or
            with `strict` a cap that no placement was found for.
    """
    _check_cap(load_cap)
    if objective == "distinct-devices" and ids_LTK is None:
        raise UserError(
            "--objective distinct-devices needs the experts of every token, a profile has pairs only; give --trace"
        )
    contiguous = Placement.in_order(profile.experts_of_layer, devices, nodes=nodes)
    threads = min(os.cpu_count() or 1, profile.num_layers)
    seconds = math.inf if time_limit is None else time_limit * threads / profile.num_layers

    def one(layer: int) -> tuple[list[int], dict[str, Any]]:
        ids_TK = None if ids_LTK is None else ids_LTK[layer]
        of = Counted(profile.counts_of_layer[layer], profile.load_of_layer[layer], profile.top_k, ids_TK)
        effort = Effort.for_experts(len(of.load_E), seed + layer, seconds)
        found, cap = search_layer(of, devices, nodes, objective, load_cap, effort)
        figures = _figures(of, found, contiguous.device_of_expert(layer), devices, nodes) | {"load_cap": cap}
        figures["gap"] = 0.0 if found.proven else _gap(figures["placed"], figures["bound"], objective)
        if replicas:
            figures["load_with_replicas"] = replicated_load(of.load_E, found.device_of_expert, devices, replicas)
        return _slots(found.device_of_expert, devices, contiguous.slots_per_device(layer)), figures

    layers, figures_of_layer = [], []
    with ThreadPoolExecutor(threads) as pool:
        for slots, figures in pool.map(one, range(profile.num_layers)):
            layers.append(slots)
            figures_of_layer.append(figures)
            advance(len(layers))
    if strict:
        _refuse_other_caps(figures_of_layer, load_cap)
    uniform = [uniform_layer(e, profile.top_k, devices, nodes) for e in profile.experts_of_layer]
    found = _over_layers(figures_of_layer, _means(uniform), objective, load_cap)
    return contiguous.model_copy(update={"layers": layers}), found


def asked_of(
    profile: Path | None, from_run: Path | None, devices: int | None, nodes: int | None
) -> tuple[Path, int, int]:
    """The profile, devices and nodes of the command line, those of a run where it names one.

    Raises:
        UserError: neither or both of profile and run, no devices, or a run folder without run.toml.
    """
    if (profile is None) == (from_run is None):
        raise UserError(f"give either a profile ({profile}) or --from-run ({from_run}), what to place by")
    if from_run is None:
        if devices is None:
            raise UserError("--devices (None) is missing, the devices that share the experts of a layer; give it")
        assert profile is not None, "just checked"
        return profile, devices, nodes or 1
    config = load_config(from_run / "run.toml")
    in_use = None if config.moe.placement is None else read_placement(config.moe.placement)
    if devices is None:
        devices = config.parallel.expert_parallel_size if in_use is None else in_use.devices
    if nodes is None:
        nodes = in_use.nodes if in_use is not None and devices == in_use.devices else 1
    return from_run / "profile.npz", devices, nodes


def check_fits(profile: Profile, devices: int, path: Path) -> None:
    """UserError unless the profile's experts can be spread over the devices."""
    fewest = min(profile.experts_of_layer)
    if not 1 <= devices <= fewest:
        raise UserError(f"--devices ({devices}) must be in 1..{fewest}, the experts of {path}; choose it there")


def parse_cap(text: str) -> float | None:
    """--load-cap as a number, None for `none`."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--load-cap ({text}) must be a number or none; correct it") from None


def on_other_text(placement: Placement, other: Profile, path: Path) -> dict[str, Figures]:
    """Means over layers of the figures of a placement and of the order of ids, on another profile of the model.

    Raises:
        UserError: it is of another model.
    """
    if other.experts_of_layer != placement.experts_of_layer:
        raise UserError(
            f"--check {path} has {in_words(other.experts_of_layer)}, the placement "
            f"{in_words(placement.experts_of_layer)}; profile the same model"
        )
    devices, nodes = placement.devices, placement.nodes
    contiguous = Placement.in_order(other.experts_of_layer, devices, nodes=nodes)
    found: dict[str, Figures] = {}
    for name, held in (("placed", placement), ("contiguous", contiguous)):
        layers = [
            describe_layer(Counted(counts_EE, load_E, other.top_k, None), held.device_of_expert(n), devices, nodes)
            for n, (counts_EE, load_E) in enumerate(zip(other.counts_of_layer, other.load_of_layer, strict=True))
        ]
        found[name] = _means(layers)
    return found


def print_placement(found: dict[str, Any], path: Path, console: Console) -> None:
    """The figures of `place` as a table, means over layers, and what to know about them."""
    names = [name for name in found["placed"] if name != "load_max_over_mean"] + ["load_max_over_mean"]
    table = Table("", "placed", "by id", "uniform", "bound", title=str(path))
    for name in names:
        columns = (f"{found[of][name]:.4f}" for of in ("placed", "contiguous", "uniform", "bound"))
        table.add_row(name.replace("_", " "), *columns)
    console.print(table)
    if "check" in found:
        table = Table("on the other text", "placed", "by id")
        for name, value in found["check"]["placed"].items():
            table.add_row(name.replace("_", " "), f"{value:.4f}", f"{found['check']['contiguous'][name]:.4f}")
        console.print(table)
    exact = sum(layer["exact"] for layer in found["layers"])
    console.print(f"proven best in {exact} of {len(found['layers'])} layers, mean gap to the bound {found['gap']:.4f}")
    if found["other_caps"]:
        caps = ", ".join(f"{number}: {cap:.4f}" for number, cap in found["other_caps"].items())
        console.print(
            f"a cap of {found['load_cap']} cannot be held in {len(found['other_caps'])} layers, which have the "
            f"smallest that was found instead ({caps})"
        )
    if found["cut_short"]:
        console.print(f"the time limit cut the search of layers {found['cut_short']} short")
    if "load_with_replicas" in found:
        console.print(f"load max over mean with the replicas: {found['load_with_replicas']:.4f}")


def _check_cap(load_cap: float | None) -> None:
    if load_cap is not None and not 1 <= load_cap < math.inf:
        raise UserError(
            f"--load-cap ({load_cap}) must be at least 1, the mean load of a device, and finite; correct it"
        )


def search_layer(
    of: Counted, devices: int, nodes: int, objective: Objective, load_cap: float | None, effort: Effort
) -> tuple[Found, float | None]:
    """The placement of a layer, and the cap that it holds."""
    mean = int(of.load_E.sum()) / devices

    def within(room: int) -> Found:
        given = {"pairs_EE": of.counts_EE} if objective == "pairs" else {"ids_TK": of.ids_TK}
        return solve(of.load_E, devices, nodes=nodes, node_weight=NODE_WEIGHT, room=room, effort=effort, **given)

    if load_cap is None:
        return within(ANY), None
    found = within(math.floor(load_cap * mean + _ROUNDING))
    if found.excess == 0:
        return found, load_cap
    # Whatever the limit: that the cap is the smallest is promised, and this search looks for nothing else.
    room = least_room(of.load_E, devices, replace(effort, seconds=math.inf))
    return within(room), room / mean


def _figures(of: Counted, found: Found, by_id: list[int], devices: int, nodes: int) -> dict[str, Any]:
    return {
        "placed": describe_layer(of, found.device_of_expert, devices, nodes),
        "contiguous": describe_layer(of, by_id, devices, nodes),
        "bound": bound_layer(of, devices, nodes),
        "exact": found.proven,
        "cut_short": found.cut_short,
    }


def _gap(found: Figures, bound: Figures, objective: Objective) -> float:
    """How far the objective is from its bound: share of pairs, or devices of a token; that of nodes counts more."""
    name = "intra_{}_fraction" if objective == "pairs" else "distinct_{}s"
    weights = {"device": 1, **({"node": NODE_WEIGHT} if name.format("node") in found else {})}
    away = sum(weight * abs(found[name.format(of)] - bound[name.format(of)]) for of, weight in weights.items())
    return away / sum(weights.values())


def _slots(device_of_expert: list[int], devices: int, per_device: int) -> list[int]:
    slots = []
    for device in range(devices):
        held = [expert for expert, d in enumerate(device_of_expert) if d == device]
        slots += held + [-1] * (per_device - len(held))
    return slots


def _refuse_other_caps(layers: list[dict[str, Any]], load_cap: float | None) -> None:
    for number, layer in enumerate(layers):
        if layer["load_cap"] != load_cap:
            raise UserError(
                f"--load-cap ({load_cap}) cannot be held in layer {number}, the smallest found is "
                f"{layer['load_cap']:.4f}; raise it, or leave out --strict"
            )


def _means(layers: list[Figures]) -> Figures:
    return {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}


def _over_layers(
    layers: list[dict[str, Any]], uniform: Figures, objective: Objective, load_cap: float | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"objective": objective, "load_cap": load_cap}
    for name in ("placed", "contiguous", "bound"):
        found[name] = _means([layer[name] for layer in layers])
    if "load_with_replicas" in layers[0]:
        found["load_with_replicas"] = float(np.mean([layer["load_with_replicas"] for layer in layers]))
    return found | {
        "uniform": uniform,
        "exact": all(layer["exact"] for layer in layers),
        "gap": float(np.mean([layer["gap"] for layer in layers])),
        "other_caps": {n: layer["load_cap"] for n, layer in enumerate(layers) if layer["load_cap"] != load_cap},
        "cut_short": [n for n, layer in enumerate(layers) if layer["cut_short"]],
        "layers": layers,
    }
