"""Place: which expert lives on which device, so that experts that work together are together.

The objective is the pair mass: the share of co-activated pairs inside a device. Where there are few enough balanced
partitions all are tried; otherwise the best of several descents by pair swaps is taken, and the result says so.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.collaboration import Profile, describe_placement
from ep_engine.errors import UserError
from ep_engine.placement import Placement

EXHAUSTIVE = 20_000  # partitions tried one by one; 16 experts on 2 devices are 6,435
_RESTARTS = 32
_ROUNDING = 1e-6  # tokens


def place(
    profile: Profile,
    devices: int,
    *,
    nodes: int = 1,
    load_cap: float | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Placement, dict[str, Any]]:
    """Find a placement with as many co-activated pairs inside devices as possible, the same number of experts on each.

    Args:
        profile: co-activation counts.
        devices: D, in 1..E; where it does not divide E some devices hold one expert less.
        nodes: of which the devices are parts; the tree of the placement begins with them.
        load_cap: most tokens that the experts of a device may get, relative to the mean device, at least 1; None: any
            number. Where no placement within it is found, one is taken that exceeds it least.
        seed: of the restarts; the exhaustive search has none.
        advance: called with the number of layers done.

    Returns:
        The placement, and what was found: `exact`; `over_cap`, the layers that exceed the cap; the two figures of
        `describe_placement` for it and for experts in the order of their ids, per layer and as means.

    Raises:
        UserError: more devices than experts, nodes that do not divide the devices, or a cap below 1.
    """
    if load_cap is not None and not 1 <= load_cap < math.inf:
        raise UserError(
            f"--load-cap ({load_cap}) must be at least 1, the mean load of a device, and finite; correct it"
        )
    contiguous = Placement.contiguous(profile.num_experts, devices, profile.num_layers, nodes=nodes)
    sizes = [contiguous.device_of_expert(0).count(device) for device in range(devices)]
    exact = num_partitions(sizes) <= EXHAUSTIVE
    layers, over_cap = [], []
    for layer in range(profile.num_layers):
        weight, load = profile.counts[layer].astype(np.float64), profile.load[layer].astype(np.float64)
        # Loads are whole tokens, the room is not: a millionth of a token is rounding.
        room = math.inf if load_cap is None else load_cap * load.sum() / devices + _ROUNDING
        search = _exhaustive(weight, sizes, load, room) if exact else _descend(weight, sizes, load, room, seed + layer)
        device_of_expert, over = search
        over_cap += [layer] if over > 0 else []
        layers.append(_slots(device_of_expert, devices, contiguous.slots_per_device))
        advance(layer + 1)
    placement = contiguous.model_copy(update={"layers": layers})
    return placement, _compare(profile, placement, contiguous) | {"exact": exact, "over_cap": over_cap}


def check_fits(profile: Profile, devices: int, path: Path) -> None:
    """UserError unless the profile's experts can be spread over the devices."""
    if not 1 <= devices <= profile.num_experts:
        raise UserError(
            f"--devices ({devices}) must be in 1..{profile.num_experts}, the experts of {path}; choose it there"
        )


def num_partitions(sizes: list[int]) -> int:
    """Ways to spread experts over devices of these sizes, devices of one size being alike."""
    ways = math.factorial(sum(sizes))
    for size in sizes:
        ways //= math.factorial(size)
    for size in set(sizes):
        ways //= math.factorial(sizes.count(size))
    return ways


def _compare(profile: Profile, placement: Placement, contiguous: Placement) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in (("placed", placement), ("contiguous", contiguous)):
        layers = describe_placement(profile, one)
        means = {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}
        found[name] = {**means, "layers": layers}
    return found


def _slots(device_of_expert: list[int], devices: int, per_device: int) -> list[int]:
    slots = []
    for device in range(devices):
        held = [expert for expert, d in enumerate(device_of_expert) if d == device]
        slots += held + [-1] * (per_device - len(held))
    return slots


def _exhaustive(
    weight: NDArray[np.float64], sizes: list[int], load: NDArray[np.float64], room: float
) -> tuple[list[int], float]:
    """The best of all partitions, of equal ones the first in the order of devices; and what exceeds `room`."""
    best, best_value = [0] * len(weight), (-math.inf, -1.0)
    for device_of_expert in _partitions(len(weight), sizes):
        value = _value(weight, np.array(device_of_expert), load, room)
        if value > best_value:
            best, best_value = list(device_of_expert), value
    return best, -best_value[0]


def _value(
    weight: NDArray[np.float64], device_E: NDArray[np.int64], load: NDArray[np.float64], room: float
) -> tuple[float, float]:
    """What placements are compared by: tokens beyond the room of a device, negative, and pair mass."""
    excess = np.maximum(np.bincount(device_E, weights=load) - room, 0.0).sum()
    mass = weight[device_E[:, None] == device_E[None, :]].sum()
    return -float(excess), float(mass)


def _partitions(num_experts: int, sizes: list[int]) -> Iterator[list[int]]:
    """Every assignment to devices; of devices alike, the one with the lower index takes the lower expert first."""
    chosen: list[int] = []
    room = list(sizes)

    def extend() -> Iterator[list[int]]:
        if len(chosen) == num_experts:
            yield chosen
            return
        seen: set[int] = set()
        for device, left in enumerate(room):
            untouched = left == sizes[device]
            if left == 0 or (untouched and sizes[device] in seen):
                continue
            if untouched:
                seen.add(sizes[device])
            room[device] -= 1
            chosen.append(device)
            yield from extend()
            chosen.pop()
            room[device] += 1

    return extend()


def _descend(
    weight: NDArray[np.float64], sizes: list[int], load: NDArray[np.float64], room: float, seed: int
) -> tuple[list[int], float]:
    """The best of several descents: from a random start, swap the pair of experts that gains most until none does."""
    random = np.random.default_rng(seed)
    start = np.repeat(np.arange(len(sizes)), sizes)
    least = 1e-9 * max(weight.max(), 1.0)
    best, best_value = start, (-math.inf, -1.0)
    for restart in range(_RESTARTS):
        device_E = start.copy() if restart == 0 else random.permutation(start)
        while True:
            gain_EE = _swap_gains(weight, device_E, len(sizes))
            relief_EE = _swap_relief(load, device_E, room, len(sizes))
            crowded = bool(relief_EE.max() > 0)  # room comes first
            if crowded:
                gain_EE = relief_EE
            gain_EE[relief_EE < 0] = 0.0
            i, j = np.unravel_index(gain_EE.argmax(), gain_EE.shape)
            if gain_EE[i, j] <= (0.0 if crowded else least):
                break
            device_E[i], device_E[j] = device_E[j], device_E[i]
        value = _value(weight, device_E, load, room)
        if value > best_value:
            best, best_value = device_E, value
    return [int(device) for device in best], -best_value[0]


def _swap_relief(
    load: NDArray[np.float64], device_E: NDArray[np.int64], room: float, devices: int
) -> NDArray[np.float64]:
    """(E, E) by how much less the devices' loads exceed their room when experts i and j are swapped."""
    load_E = np.bincount(device_E, weights=load, minlength=devices)[device_E]
    after_EE = load_E[:, None] - load[:, None] + load[None, :]  # on the device of i
    over_E, over_EE = np.maximum(load_E - room, 0.0), np.maximum(after_EE - room, 0.0)
    relief_EE: NDArray[np.float64] = over_E[:, None] + over_E[None, :] - over_EE - over_EE.T
    relief_EE[(device_E[:, None] == device_E[None, :]) | (np.abs(relief_EE) < _ROUNDING)] = 0.0
    return relief_EE


def _swap_gains(weight: NDArray[np.float64], device_E: NDArray[np.int64], devices: int) -> NDArray[np.float64]:
    """(E, E) pair mass won by swapping experts i and j: each gives up its ties at home for those at the other's."""
    member_ED = (device_E[:, None] == np.arange(devices)[None, :]).astype(np.float64)
    tie_ED = weight @ member_ED
    home_E = tie_ED[np.arange(len(weight)), device_E]
    there_EE = tie_ED[:, device_E]
    gain_EE: NDArray[np.float64] = there_EE + there_EE.T - home_E[:, None] - home_E[None, :] - 2 * weight
    gain_EE[device_E[:, None] == device_E[None, :]] = 0.0
    return gain_EE
