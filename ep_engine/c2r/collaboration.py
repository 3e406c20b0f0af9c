"""Collaboration: who works with whom, arXiv:2504.01337. Counts, and the lists made of them.

Letters:  L MoE layers   E experts   K top_k
"""

import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ep_engine.errors import UserError
from ep_engine.output import whole_file

# What numpy and zipfile raise on a file that is cut short or damaged.
UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def why_unreadable(error: BaseException) -> str:
    """What is wrong with a file, without numpy's advice to read unsafely what it does not know."""
    return "it is no .npz of numbers" if "allow_pickle" in str(error) else str(error)


@dataclass(frozen=True)
class Profile:
    """What `ep-engine profile` counted.

    Attributes:
        counts: (L, E, E) int64, symmetric: tokens that both experts served; the diagonal is 0.
        load: (L, E) int64: tokens of each expert.
        top_k: K.
        about: tokens, seed and hashes, as plain values.
        experts: how many experts each layer has, where that differs; what is beyond in the arrays is 0. (): E.
    """

    counts: NDArray[np.int64]
    load: NDArray[np.int64]
    top_k: int
    about: dict[str, Any]
    experts: tuple[int, ...] = ()

    @classmethod
    def of_pairs(
        cls, pairs_LEE: NDArray[np.int64], top_k: int, about: dict[str, Any], experts: Sequence[int] = ()
    ) -> Self:
        """Of what `ops.count_pairs` counted, whose diagonal is the load."""
        counts = pairs_LEE.copy()
        diagonal = range(counts.shape[1])
        counts[:, diagonal, diagonal] = 0
        return cls(counts, np.diagonal(pairs_LEE, axis1=1, axis2=2).copy(), top_k, about, tuple(experts))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.counts)

    @property
    def num_experts(self) -> int:
        """E; where layers have different numbers, the largest."""
        return len(self.counts[0])

    @property
    def experts_of_layer(self) -> list[int]:
        """[L]: how many experts every layer has."""
        return list(self.experts) or [self.num_experts] * self.num_layers

    @property
    def counts_of_layer(self) -> list[NDArray[np.int64]]:
        """[L] of (E, E), without what fills up `counts`."""
        return [counts_EE[:e, :e] for counts_EE, e in zip(self.counts, self.experts_of_layer, strict=True)]

    @property
    def load_of_layer(self) -> list[NDArray[np.int64]]:
        """[L] of (E,), without what fills up `load`."""
        return [load_E[:e] for load_E, e in zip(self.load, self.experts_of_layer, strict=True)]

    def save(self, path: Path) -> None:
        """Write `profile.npz`."""
        arrays: dict[str, Any] = {"counts": self.counts, "load": self.load, "top_k": self.top_k, **self.about}
        if len(set(self.experts)) > 1:
            arrays["experts"] = np.array(self.experts)
        with whole_file(path) as beside, beside.open("wb") as file:  # given a name, numpy would add to it
            np.savez_compressed(file, **arrays)


def read_profile(path: Path) -> Profile:
    """Read `profile.npz`; `counts`, `load` and `top_k` are enough.

    Raises:
        UserError: it is missing or unreadable, an array is missing, or the counts are no symmetric (L, E, E).
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise UserError(
            f"profile {path} cannot be read ({why_unreadable(error)}); make one with `ep-engine profile`"
        ) from None
    missing = [name for name in ("counts", "load", "top_k") if name not in arrays]
    if missing:
        raise UserError(f"profile {path} has no array {missing[0]}; make it with `ep-engine profile`")
    counts, load, top_k = arrays.pop("counts"), arrays.pop("load"), arrays.pop("top_k")
    for name, array in (("counts", counts), ("load", load), ("top_k", top_k)):
        if not np.issubdtype(array.dtype, np.integer) or (name == "top_k" and array.ndim != 0):
            raise UserError(
                f"profile {path} must hold integers in {name}, got {array.dtype} {array.shape}; make it again"
            )
    if counts.ndim != 3 or load.shape != counts.shape[:2]:
        raise UserError(
            f"profile {path} has counts {counts.shape} and load {load.shape}, expected (L, E, E) and (L, E); make it "
            "again"
        )
    experts = _experts(arrays.pop("experts", None), counts, load, path)
    about = {name: array.tolist() for name, array in arrays.items()}
    return Profile(checked_counts(counts, int(top_k), path), load.astype(np.int64), int(top_k), about, experts)


def _experts(given: NDArray[Any] | None, counts: NDArray[Any], load: NDArray[Any], path: Path) -> tuple[int, ...]:
    """How many experts each layer has; UserError unless the arrays are 0 beyond them."""
    if given is None:
        return ()
    fits = given.shape == load.shape[:1] and np.issubdtype(given.dtype, np.integer)
    if not fits or not all(
        1 <= n <= load.shape[1] and not of[n:].any() and not pairs[n:].any()
        for n, of, pairs in zip(given.tolist(), load, counts, strict=True)
    ):
        raise UserError(
            f"profile {path} must say in experts how many each of {len(load)} layers has, and count nobody else, got "
            f"{given.tolist()}; make it again"
        )
    return tuple(given.tolist())


def checked_counts(counts: NDArray[Any], top_k: int, path: Path) -> NDArray[np.int64]:
    """Co-activation counts (L, E, E) with 0 on the diagonal, where published files hold 0 or -1.

    Raises:
        UserError: they are no integers of that shape, not symmetric, negative, or a layer has none.
    """
    square = counts.ndim == 3 and counts.shape[1] == counts.shape[2] and counts.size > 0
    if not np.issubdtype(counts.dtype, np.integer) or not square:
        raise UserError(
            f"counts in {path} must be integers (L, E, E), got {counts.dtype} {counts.shape}; make them again"
        )
    counts = counts.astype(np.int64)
    counts[:, range(counts.shape[1]), range(counts.shape[1])] = 0
    if (counts < 0).any() or (counts != counts.transpose(0, 2, 1)).any():
        raise UserError(f"counts in {path} must be symmetric and not negative; make them again")
    empty = np.flatnonzero(counts.sum(axis=(1, 2)) == 0)
    if top_k > 1 and len(empty):
        raise UserError(
            f"counts in {path} have no pair in layer {empty[0]}, though tokens have {top_k} experts; make them again"
        )
    return counts


def collaboration_lists(layers: Iterable[NDArray[np.int64]]) -> list[list[list[int]]]:
    """[L][E][E]: row i lists all experts, those that served most tokens together with i first, i itself last.

    Equal counts go to the lower id. `layers` are counts (E, E).
    """
    lists = []
    for counts_EE in layers:
        masked = counts_EE.astype(np.int64)
        np.fill_diagonal(masked, -1)
        lists.append(np.argsort(-masked, axis=1, kind="stable").tolist())
    return lists


def agreement(one: Iterable[NDArray[np.int64]], other: Iterable[NDArray[np.int64]]) -> list[float]:
    """Correlation, in [-1, 1], of the pairs that two counts of the same model have, for each layer; NaN where either
    has the same number everywhere.

    Of two halves of a profile it says how far another text of that length would agree.
    """
    found = []
    for one_EE, other_EE in zip(one, other, strict=True):
        pairs = np.triu_indices(len(one_EE), 1)
        found.append(_correlation(one_EE[pairs].astype(np.float64), other_EE[pairs].astype(np.float64)))
    return found


def drift(stored: Iterable[NDArray[np.int64]], recent: Iterable[NDArray[np.int64]]) -> dict[str, float]:
    """How far counts have moved from others of the same model, as means over layers.

    Returns:
        `l1`, half the sum of absolute differences of the shares of pairs, in [0, 1]; `rank_correlation` (Spearman) of
        the pairs, in [-1, 1], 1 if none has moved past another; layers without pairs are left out.
    """
    distances, correlations = [], []
    for stored_EE, recent_EE in zip(stored, recent, strict=True):
        pairs = np.triu_indices(len(stored_EE), 1)
        a, b = stored_EE[pairs], recent_EE[pairs]
        if a.any() and b.any():
            distances.append(float(np.abs(a / a.sum() - b / b.sum()).sum()) / 2)
            correlations.append(_correlation(_ranks(a), _ranks(b)))
    known = [value for value in correlations if not math.isnan(value)]
    return {
        "l1": float(np.mean(distances)) if distances else 0.0,
        "rank_correlation": float(np.mean(known)) if known else 1.0,
    }


def _ranks(values: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks from 0, the mean of theirs for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = ((ends - counts + ends - 1) / 2)[inverse]
    return ranks


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else math.nan
