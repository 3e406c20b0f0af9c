"""The Python face of csrc/solver: which experts share a device.

Shape letters:  E experts   D devices   T tokens   K top_k
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ep_engine import _solver

ANY = np.iinfo(np.int64).max  # room where the load of a device has no limit


@dataclass(frozen=True)
class Effort:
    """How long a search goes on. The same effort finds the same placement, unless `seconds` cuts it short."""

    seed: int = 0
    starts: int = 24  # of the search over pairs
    refined: int = 2  # of their ends that are refined over tokens
    patience: int = 400  # swaps without a better placement, after which a search ends
    partitions: int = 4_000_000  # partial placements that a proof may look at; beyond, nothing is proven
    seconds: float = math.inf

    @classmethod
    def for_experts(cls, num_experts: int, seed: int, seconds: float) -> Self:
        """About as much work for any number of experts above 64: a step tries all pairs of them."""
        few = min(1.0, 64 / num_experts)
        return cls(seed, starts=max(4, round(24 * few**2)), patience=max(100, round(400 * few)), seconds=seconds)


@dataclass(frozen=True)
class Found:
    """The best placement found."""

    device_of_expert: list[int]
    excess: int  # load beyond the room, summed over devices
    proven: bool  # there is no better one
    cut_short: bool  # by the time


def solve(
    load_E: NDArray[np.int64],
    devices: int,
    *,
    pairs_EE: NDArray[np.int64] | None = None,
    ids_TK: NDArray[np.int16] | None = None,
    nodes: int = 1,
    node_weight: int = 1,
    room: int = ANY,
    effort: Effort = Effort(),
) -> Found:
    """Put experts on devices, as many on each or one less, so that tokens find theirs on few.

    Args:
        load_E: tokens of each expert.
        devices: D, at most E.
        pairs_EE: tokens that both experts serve, symmetric: the pairs inside devices are maximised.
        ids_TK: distinct experts of tokens: the devices of tokens are minimised. One of the two must be given.
        nodes: equal runs of devices; must divide D.
        node_weight: what a pair inside a node, or a node of a token, counts beside one of a device.
        room: most load of a device. Placements that exceed it less are better, whatever the objective.
        effort: of the search.
    """
    _check(load_E, devices, nodes, pairs_EE, ids_TK)
    device_E, _, excess, proven, cut_short = _solver.solve(
        devices=devices,
        nodes=nodes,
        node_weight=node_weight,
        pairs=None if pairs_EE is None else np.ascontiguousarray(pairs_EE, dtype=np.int64),
        tokens=None if ids_TK is None else np.ascontiguousarray(ids_TK, dtype=np.int16),
        load=np.ascontiguousarray(load_E, dtype=np.int64),
        room=room,
        seed=effort.seed,
        starts=effort.starts,
        refined=effort.refined,
        steps=effort.patience,
        partitions=effort.partitions,
        seconds=effort.seconds,
    )
    return Found(device_E.tolist(), excess, proven, cut_short)


def least_room(load_E: NDArray[np.int64], devices: int, effort: Effort = Effort()) -> int:
    """The least room in which a placement was found.

    Whether a placement fits is asked of the search, with nothing else to look for, at one room after another.
    """
    num_experts, slots = len(load_E), -(-len(load_E) // devices)
    fewest = num_experts // devices  # experts of a device
    largest = int(load_E.max()) + int(np.sort(load_E)[: fewest - 1].sum())  # beside the busiest, the least busy
    low = max(-(-int(load_E.sum()) // devices), largest)
    high = int(np.sort(load_E)[-slots:].sum())
    effort = replace(effort, starts=max(effort.starts // 4, 1))
    nothing = np.zeros((num_experts, num_experts), dtype=np.int64)
    while low < high:
        middle = (low + high) // 2
        found = solve(load_E, devices, pairs_EE=nothing, room=middle, effort=effort)
        if found.excess == 0:
            device_load = np.bincount(found.device_of_expert, weights=load_E, minlength=devices)
            high = int(device_load.max())
        else:
            low = middle + 1
    return high


def _check(
    load_E: NDArray[np.int64],
    devices: int,
    nodes: int,
    pairs_EE: NDArray[np.int64] | None,
    ids_TK: NDArray[np.int16] | None,
) -> None:
    """The solver reads plain memory: what would lead it astray ends here."""
    num_experts = len(load_E)
    assert 1 <= devices <= num_experts, (devices, num_experts)
    assert devices % nodes == 0, (devices, nodes)
    assert (pairs_EE is None) != (ids_TK is None), "pairs or tokens"
    if pairs_EE is not None:
        assert pairs_EE.shape == (num_experts, num_experts), pairs_EE.shape
    if ids_TK is not None:
        assert ids_TK.ndim == 2, ids_TK.shape
        assert not ids_TK.size or 0 <= ids_TK.min() <= ids_TK.max() < num_experts, "experts of tokens"
