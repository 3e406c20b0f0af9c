"""Locality: what a placement costs, and what no placement can do better.

Shape letters:  E experts   D devices   T tokens   K top_k   G groups, devices or nodes   S slots of a group
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Figures = dict[str, float]


class Counted(NamedTuple):
    """What was counted of a layer."""

    counts_EE: NDArray[np.int64]  # tokens of both experts
    load_E: NDArray[np.int64]  # tokens of each
    top_k: int
    ids_TK: NDArray[np.int16] | None = None  # experts of every token, where they were kept


def fraction_inside(counts_EE: NDArray[np.int64], group_of_expert: Sequence[int]) -> float:
    """Share of all co-activated pairs whose experts are in one group, in [0, 1]; 1 if there are no pairs.

    For K = 2 the expected number of distinct groups of a token is 2 minus this, whatever the distribution.
    """
    group_E = np.array(group_of_expert)
    pairs = counts_EE.astype(np.float64)
    np.fill_diagonal(pairs, 0.0)
    total = pairs.sum()
    return float(pairs[group_E[:, None] == group_E[None, :]].sum() / total) if total > 0 else 1.0


def distinct_groups(ids_TK: NDArray[np.int16], group_of_expert: Sequence[int]) -> float:
    """Mean number of groups that hold the experts of a token, in [1, min(K, G)]."""
    group_TK = np.sort(np.array(group_of_expert, dtype=np.int16)[ids_TK], axis=1)
    return float(1 + (np.diff(group_TK, axis=1) != 0).sum() / len(ids_TK))


def device_load(load_E: NDArray[np.int64], device_of_expert: Sequence[int], devices: int) -> NDArray[np.float64]:
    """(D,) tokens of each device's experts, relative to their mean."""
    load_D = np.bincount(device_of_expert, weights=load_E, minlength=devices)
    relative: NDArray[np.float64] = load_D / max(load_D.mean(), np.finfo(np.float64).tiny)
    return relative


def describe_layer(of: Counted, device_of_expert: Sequence[int], devices: int, nodes: int = 1) -> Figures:
    """What the placement of a layer costs.

    Returns:
        `intra_device_fraction` of pairs and `load_max_over_mean` of devices; `distinct_devices` of a token and its
        `remote_copies`, those on other devices than its own where tokens are spread evenly, if the tokens are known or
        K is 2; on several nodes the first and the third for nodes too.
    """
    figures = {"load_max_over_mean": float(device_load(of.load_E, device_of_expert, devices).max())}
    levels = {"device": list(device_of_expert)}
    if nodes > 1:
        levels["node"] = [device * nodes // devices for device in device_of_expert]
    for name, groups in levels.items():
        figures[f"intra_{name}_fraction"] = fraction_inside(of.counts_EE, groups)
        if of.ids_TK is not None:
            figures[f"distinct_{name}s"] = distinct_groups(of.ids_TK, groups)
        elif of.top_k == 2:
            figures[f"distinct_{name}s"] = 2 - figures[f"intra_{name}_fraction"]
    if "distinct_devices" in figures:
        figures["remote_copies"] = figures["distinct_devices"] * (1 - 1 / devices)
    return figures


def bound_layer(of: Counted, devices: int, nodes: int = 1) -> Figures:
    """What the figures of `describe_layer` can be at best, each by itself; for any placement of as many slots."""
    bounds: Figures = {"load_max_over_mean": 1.0}
    size = -(-len(of.load_E) // devices) * devices
    levels = {"device": devices, **({"node": nodes} if nodes > 1 else {})}
    for (name, groups), fraction in zip(
        levels.items(), most_inside(of.counts_EE, size, list(levels.values())), strict=True
    ):
        bounds[f"intra_{name}_fraction"] = fraction
        bounds[f"distinct_{name}s"] = least_distinct(fraction, of.top_k, groups, size // groups)
    bounds["remote_copies"] = bounds["distinct_devices"] * (1 - 1 / devices)
    return bounds


def uniform_layer(num_experts: int, top_k: int, devices: int, nodes: int = 1) -> Figures:
    """What the figures of `describe_layer` would be if every set of K experts were as likely, whatever the placement.

    A group of m experts is met by a token with probability 1 - C(E - m, K) / C(E, K).
    """
    figures: Figures = {"load_max_over_mean": 1.0}
    for name, groups in {"device": devices, **({"node": nodes} if nodes > 1 else {})}.items():
        sizes = [(g + 1) * num_experts // groups - g * num_experts // groups for g in range(groups)]
        pairs = num_experts * (num_experts - 1)
        figures[f"intra_{name}_fraction"] = sum(m * (m - 1) for m in sizes) / pairs if pairs else 1.0
        missed = sum(math.comb(num_experts - m, top_k) for m in sizes) / math.comb(num_experts, top_k)
        figures[f"distinct_{name}s"] = groups - missed
    figures["remote_copies"] = figures["distinct_devices"] * (1 - 1 / devices)
    return figures


def replicated_load(load_E: NDArray[np.int64], device_of_expert: Sequence[int], devices: int, copies: int) -> float:
    """Largest load of a device relative to the mean, if busy experts had so many more copies.

    One after the other, the expert whose copies are busiest gets one more, on the least busy device without it, and its
    tokens are spread evenly over its copies; until all are everywhere.
    """
    homes = [[device] for device in device_of_expert]
    load = load_E.astype(np.float64)

    def of_copy(expert: int) -> float:
        return float(load[expert] / len(homes[expert]))

    def of_devices() -> NDArray[np.float64]:
        load_D = np.zeros(devices)
        for expert, home in enumerate(homes):
            load_D[home] += of_copy(expert)
        return load_D

    for _ in range(min(copies, len(homes) * (devices - 1))):
        busiest = max((expert for expert, home in enumerate(homes) if len(home) < devices), key=of_copy)
        load_D = of_devices()
        load_D[homes[busiest]] = np.inf
        homes[busiest].append(int(load_D.argmin()))
    load_D = of_devices()
    return float(load_D.max() / max(load_D.mean(), np.finfo(np.float64).tiny))


def most_inside(counts_EE: NDArray[np.int64], size: int, groups: Sequence[int]) -> list[float]:
    """No partition of `size` slots into so many equal groups has a larger share of pairs inside; for each of `groups`.

    The least of three: all of them; every expert with its S - 1 best partners; and the eigenvalue bound of Rendl and
    Wolkowicz (Math. Programming 53, 1992): s(A) / G + S times the G - 1 largest eigenvalues of A on the complement of
    the ones, where s sums a matrix and A = counts + diag(u) for any u that sums to 0. Some are tried, from none to the
    Laplacian's (Donath and Hoffman 1973).
    """
    pairs = np.zeros((size, size))  # slots that stay empty are experts without pairs
    pairs[: len(counts_EE), : len(counts_EE)] = counts_EE
    np.fill_diagonal(pairs, 0.0)
    total = pairs.sum()
    if total == 0:
        return [1.0] * len(groups)
    best_first = np.sort(pairs, axis=1)[:, ::-1]
    spectra = [_spectrum(pairs, share) for share in (0.0, 0.5, 1.0)]
    bounds = []
    for count in groups:
        slots = size // count
        with_best = best_first[:, : slots - 1].sum()
        by_eigenvalues = [total / count + slots * values[: count - 1].sum() for values in spectra]
        bounds.append(float(max(min(total, with_best, *by_eigenvalues), 0.0) / total))
    return bounds


def _spectrum(pairs: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Eigenvalues, largest first, of the pairs less a share of the Laplacian's diagonal, off the ones."""
    row_sums = pairs.sum(axis=1)
    shifted = pairs + np.diag(share * (row_sums.mean() - row_sums))
    centred = shifted - shifted.mean(axis=0)[None, :] - shifted.mean(axis=1)[:, None] + shifted.mean()
    least = -np.abs(centred).sum() - 1.0  # that of the ones: below all others, and left out
    values: NDArray[np.float64] = np.linalg.eigvalsh(centred + least / len(pairs))[1:][::-1]
    return values


def least_distinct(inside: float, top_k: int, groups: int, slots: int) -> float:
    """Fewest groups of a token on average, if at most the share `inside` of all pairs is inside a group.

    A token on n groups has at least the pairs inside that it has where its experts are spread evenly over them: so
    many pairs are needed for so few groups. The convex hull of these points bounds any mixture of tokens.
    """
    points = []
    for n in range(-(-top_k // slots), min(top_k, groups) + 1):
        each, more = divmod(top_k, n)
        points.append((more * each + n * each * (each - 1) // 2, n))
    pairs_inside = inside * top_k * (top_k - 1) / 2
    hull: list[tuple[int, int]] = []
    for point in sorted(points):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return float(np.interp(pairs_inside, [x for x, _ in hull], [y for _, y in hull]))


def _turns_up(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
