"""Published files of C2R (github.com/UNITES-Lab/c2r-moe): counts as pickles, lists in `config.json` or as pickles.

How pickles are read without running them is in plain_pickle.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile, checked_counts
from ep_engine.c2r.plain_pickle import read_plain_pickle
from ep_engine.errors import UserError


def read_published_counts(path: Path, top_k: int | None) -> Profile:
    """A `*_collaboration.pkl`: one integer array (L, E, E), whose diagonal may be 0 or -1.

    The load is not in it: for `top_k` = k it is the sum of a row over k - 1.

    Raises:
        UserError: it is no such pickle, or `top_k` is missing or does not divide the sums of rows.
    """
    counts = read_plain_pickle(path)
    if not isinstance(counts, np.ndarray):
        raise UserError(f"{path} holds {type(counts).__name__}, not one array of counts (L, E, E); give another file")
    if top_k is None or top_k < 2:
        raise UserError(
            f"--top-k ({top_k}) must be the model's number of experts per token, at least 2, for counts in {path}; "
            "give it"
        )
    counts = checked_counts(counts, top_k, path)
    pairs = counts.sum(axis=2)
    if (pairs % (top_k - 1)).any():
        layer = int(np.flatnonzero((pairs % (top_k - 1)).any(axis=1))[0])
        raise UserError(
            f"--top-k ({top_k}): rows of layer {layer} in {path} do not add up to multiples of {top_k - 1}; give the "
            "model's own"
        )
    load = pairs // (top_k - 1)
    return Profile(counts, load, top_k, {"tokens": int(load[0].sum()) // top_k, "source": path.name})


def refuse_unread(path: Path, given: dict[str, Any]) -> None:
    """UserError if an option is given that published counts have no use for."""
    for option, value in given.items():
        if value is not None:
            raise UserError(
                f"{option} has no effect on published counts ({path}), which hold no model to run; leave it out"
            )


def read_lists(path: Path) -> tuple[list[list[list[int]]], int | None]:
    """Collaboration lists [L][E][E] of a `config.json` (`collaborative_list`, `top_t`) or of a pickled nested list; T.

    Raises:
        UserError: the file is neither, or its lists are no integers of that shape. Whether they fit a model is for the
            rules to say.
    """
    if path.suffix == ".pkl":
        lists, top_t = read_plain_pickle(path), None
    else:
        try:
            raw = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"lists {path} cannot be read ({error}); give a config.json with collaborative_list"
            ) from None
        lists = raw.get("collaborative_list") if isinstance(raw, dict) else None
        top_t = raw.get("top_t") if isinstance(raw, dict) else None
    table = _as_table(lists)
    if table is None or (top_t is not None and (not isinstance(top_t, int) or isinstance(top_t, bool))):
        raise UserError(
            f"{path} must hold collaborative_list as integers [layers][experts][experts] and top_t as one; correct it"
        )
    checked: list[list[list[int]]] = table.tolist()
    return checked, top_t


def _as_table(lists: Any) -> NDArray[np.int64] | None:
    try:
        table = np.array(lists)
    except ValueError:  # rows of different lengths
        return None
    whole = np.issubdtype(table.dtype, np.integer) and table.ndim == 3 and table.size > 0
    return table.astype(np.int64) if whole and table.shape[1] == table.shape[2] else None
