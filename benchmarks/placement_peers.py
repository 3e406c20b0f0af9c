"""How others would place experts: METIS, a spectral cut, and the greedy of Occult; all with as many on every device.

Shape letters:  E experts   G groups
"""

from collections.abc import Callable

import numpy as np
import pymetis
from numpy.typing import NDArray

Pairs = NDArray[np.int64]


def metis(pairs_EE: Pairs, groups: int, seed: int = 0) -> list[int]:
    """METIS' multilevel partition (recursive bisection for few groups, as it advises, else k-way), repaired."""
    weight = np.rint(pairs_EE * (1e6 / max(pairs_EE.max(), 1))).astype(np.int64)  # it reads 32 bits
    rows = [np.flatnonzero(weight[expert]) for expert in range(len(weight))]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    best: list[int] = []
    for recursive in (True, False):
        options = pymetis.Options(seed=seed, ncuts=10, niter=20, ufactor=1)
        _, part = pymetis.part_graph(
            groups,
            pymetis.CSRAdjacency(starts.tolist(), np.concatenate(rows).tolist()),
            eweights=np.concatenate([weight[expert, row] for expert, row in enumerate(rows)]).tolist(),
            recursive=recursive,
            options=options,
        )
        found = repaired(list(part), pairs_EE, groups)
        if not best or mass(pairs_EE, found) > mass(pairs_EE, best):
            best = found
    return best


def recursive_metis(pairs_EE: Pairs, devices: int, nodes: int) -> list[int]:
    """Nodes first, then the devices of each."""
    node_E = np.array(metis(pairs_EE, nodes))
    device_E = np.empty(len(pairs_EE), dtype=np.int64)
    for node in range(nodes):
        held = np.flatnonzero(node_E == node)
        inside = metis(pairs_EE[np.ix_(held, held)], devices // nodes)
        device_E[held] = node * (devices // nodes) + np.array(inside)
    return [int(device) for device in device_E]


def spectral(pairs_EE: Pairs, groups: int, seed: int = 0) -> list[int]:
    """Ng, Jordan and Weiss (2001): k-means on the first eigenvectors of the normalised Laplacian, repaired."""
    degree = np.maximum(pairs_EE.sum(axis=1), 1)
    normal = pairs_EE / np.sqrt(degree[:, None] * degree[None, :])
    _, vectors = np.linalg.eigh(normal)
    points = vectors[:, -groups:]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    random = np.random.default_rng(seed)
    best: list[int] = []
    for _ in range(10):
        centres = points[random.choice(len(points), groups, replace=False)]
        for _ in range(50):
            part = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
            for group in range(groups):
                if (part == group).any():
                    centres[group] = points[part == group].mean(axis=0)
        found = repaired([int(p) for p in part], pairs_EE, groups)
        if not best or mass(pairs_EE, found) > mass(pairs_EE, best):
            best = found
    return best


def occult(pairs_EE: Pairs, groups: int) -> list[int]:
    """Algorithm 1 of arXiv:2505.13345: far seeds first, then each group takes whom its members work with most."""
    num_experts = len(pairs_EE)
    sizes = [len(part) for part in np.array_split(np.arange(num_experts), groups)]
    first, second = np.unravel_index(pairs_EE.argmax(), pairs_EE.shape)
    held = [[int(first), int(second)][: sizes[0]]]
    free = [expert for expert in range(num_experts) if expert not in held[0]]
    for _ in range(1, groups):
        placed = [expert for group in held for expert in group]
        held.append([min(free, key=lambda e: int(pairs_EE[e, placed].sum()))])
        free.remove(held[-1][0])
    for group, size in zip(held, sizes, strict=True):
        while len(group) < size:
            group.append(max(free, key=lambda e: int(pairs_EE[e, group].sum())))
            free.remove(group[-1])
    device_E = [0] * num_experts
    for device, group in enumerate(held):
        for expert in group:
            device_E[expert] = device
    return device_E


def repaired(part: list[int], pairs_EE: Pairs, groups: int) -> list[int]:
    """The same with equal groups: of groups that have too many the expert that loses least moves, one by one."""
    part_E = np.array(part)
    wanted = np.full(groups, len(part) // groups)
    largest_first = np.argsort(-np.bincount(part_E, minlength=groups), kind="stable")
    wanted[largest_first[: len(part) % groups]] += 1

    def tie(expert: int, group: int) -> int:
        return int(pairs_EE[expert, part_E == group].sum())

    while True:
        over = np.bincount(part_E, minlength=groups) - wanted
        moves = [
            (tie(expert, to) - tie(expert, home), expert, to)
            for expert, home in enumerate(part_E.tolist())
            if over[home] > 0
            for to in np.flatnonzero(over < 0).tolist()
        ]
        if not moves:
            return [int(group) for group in part_E]
        _, expert, to = max(moves)
        part_E[expert] = to


def mass(pairs_EE: Pairs, part: list[int]) -> int:
    """Pairs inside groups."""
    part_E = np.array(part)
    return int(pairs_EE[part_E[:, None] == part_E[None, :]].sum())


PEERS: dict[str, Callable[[Pairs, int], list[int]]] = {"metis": metis, "spectral": spectral, "occult": occult}
