"""Collaboration: who works with whom, arXiv:2504.01337. Counts, and the lists made of them.

Letters:  L MoE layers   E experts   K top_k
"""

import math
import zipfile
import zlib
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
    """

    counts: NDArray[np.int64]
    load: NDArray[np.int64]
    top_k: int
    about: dict[str, Any]

    @classmethod
    def of_pairs(cls, pairs_LEE: NDArray[np.int64], top_k: int, about: dict[str, Any]) -> Self:
        """Of what `ops.count_pairs` counted, whose diagonal is the load."""
        counts = pairs_LEE.copy()
        diagonal = range(counts.shape[1])
        counts[:, diagonal, diagonal] = 0
        return cls(counts, np.diagonal(pairs_LEE, axis1=1, axis2=2).copy(), top_k, about)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.counts)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts[0])

    def save(self, path: Path) -> None:
        """Write `profile.npz`."""
        with whole_file(path) as beside, beside.open("wb") as file:  # given a name, numpy would add to it
            np.savez_compressed(file, counts=self.counts, load=self.load, top_k=self.top_k, **self.about)


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
    about = {name: array.tolist() for name, array in arrays.items()}
    return Profile(checked_counts(counts, int(top_k), path), load.astype(np.int64), int(top_k), about)


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


def collaboration_lists(counts_LEE: NDArray[np.int64]) -> list[list[list[int]]]:
    """[L][E][E]: row i lists all experts, those that served most tokens together with i first, i itself last.

    Equal counts go to the lower id.
    """
    num_experts = counts_LEE.shape[1]
    masked = counts_LEE.astype(np.int64).copy()
    masked[:, range(num_experts), range(num_experts)] = -1
    lists: list[list[list[int]]] = np.argsort(-masked, axis=2, kind="stable").tolist()
    return lists


def agreement(one_LEE: NDArray[np.int64], other_LEE: NDArray[np.int64]) -> list[float]:
    """Correlation, in [-1, 1], of the pairs that two counts of the same model have, for each layer; NaN where either
    has the same number everywhere.

    Of two halves of a profile it says how far another text of that length would agree.
    """
    rows, columns = np.triu_indices(one_LEE.shape[1], 1)
    layers = zip(one_LEE.astype(np.float64), other_LEE.astype(np.float64), strict=True)
    return [_correlation(one[rows, columns], other[rows, columns]) for one, other in layers]


def drift(stored_LEE: NDArray[np.int64], recent_LEE: NDArray[np.int64]) -> dict[str, float]:
    """How far counts have moved from others of the same model, as means over layers.

    Returns:
        `l1`, half the sum of absolute differences of the shares of pairs, in [0, 1]; `rank_correlation` (Spearman) of
        the pairs, in [-1, 1], 1 if none has moved past another; layers without pairs are left out.
    """
    rows, columns = np.triu_indices(stored_LEE.shape[1], 1)
    distances, correlations = [], []
    for stored, recent in zip(stored_LEE, recent_LEE, strict=True):
        a, b = stored[rows, columns], recent[rows, columns]
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
