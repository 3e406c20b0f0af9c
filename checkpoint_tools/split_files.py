"""Published split files: which neurons belong to which expert, a file for each layer (LLaMA-MoE).

    DIR/layers.{i}.mlp.up_proj.weight    saved by torch: a label for each neuron, as ints, numpy's ints or floats, or
                                         the neurons of each expert, best first

Which of the two it is shows its nesting. Nothing in a file is run: it may hold numbers, lists and numpy's arrays.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ep_engine.c2r.plain_pickle import plain_pickle
from ep_engine.errors import UserError

Neurons = list[NDArray[np.int64]]


def file_of(folder: Path, layer: int, projection: str) -> Path:
    """The file of a layer; `projection` is `up_proj` or `gate_proj` and means no more than a name."""
    return folder / f"layers.{layer}.mlp.{projection}.weight"


def read_split_file(path: Path, num_experts: int, width: int) -> Neurons:
    """The neurons of every expert: ascending of labels, else in the order of the file; of any number, not all of them.

    Args:
        path: of one layer.
        num_experts: E.
        width: N.

    Raises:
        UserError: the file is missing or damaged or wants to run something, or does not hold such experts.
    """
    value = plain_pickle(_pickle_in(path), path)
    label_N, experts = _whole_numbers(value), list[NDArray[np.int64]]()
    if label_N is not None and label_N.shape == (width,) and label_N.min() >= 0 and label_N.max() < num_experts:
        experts = [np.flatnonzero(label_N == expert) for expert in range(num_experts)]
    elif isinstance(value, (list, tuple, np.ndarray)) and len(value) == num_experts:
        rows = [_whole_numbers(row) for row in value]
        experts = [row for row in rows if row is not None and _are_neurons(row, width)]
    if len(experts) != num_experts or not all(map(len, experts)):
        shape = "" if label_N is None else f" of {len(label_N)} numbers"
        raise UserError(
            f"{path} must hold {width} labels in 0..{num_experts - 1}, each of them there, or {num_experts} lists of "
            f"distinct neurons in 0..{width - 1}; got {type(value).__name__}{shape}; correct --num-experts or the file"
        )
    return experts


def _whole_numbers(value: object) -> NDArray[np.int64] | None:
    """A list of whole numbers; None if it is none."""
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    if found.ndim != 1 or found.dtype.kind not in "iuf" or bool((found != np.floor(found)).any()):
        return None
    return found.astype(np.int64) if len(found) and bool((abs(found) < 2**53).all()) else None


def _are_neurons(row: NDArray[np.int64], width: int) -> bool:
    return bool(row.min() >= 0 and row.max() < width) and len(set(row.tolist())) == len(row)


def write_split_file(path: Path, experts: Neurons, width: int, *, as_lists: bool = False) -> None:
    """Labels as a list of ints, as the published random split writes them; every neuron belongs to one expert.

    `as_lists`: the neurons of every expert, as published splits have it where a neuron may be in several experts or in
    none, and those with residual experts, which come first.
    """
    if as_lists:
        torch.save([neurons.tolist() for neurons in experts], path)
        return
    label_N = np.empty(width, dtype=np.int64)
    for expert, neurons in enumerate(experts):
        label_N[neurons] = expert
    torch.save(label_N.tolist(), path)


def _pickle_in(path: Path) -> bytes:
    """What torch.save has pickled: a member of a zip archive."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"split file {path} cannot be read ({error.strerror}); correct the folder or --on") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return archive.read(name)
    except (zipfile.BadZipFile, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"split file {path} was not saved by torch ({error}); give another") from None


def covers_once(experts: Neurons, width: int) -> bool:
    """Whether every neuron belongs to one expert, so that all experts together are the dense FFN."""
    return np.array_equal(np.sort(np.concatenate(experts)), np.arange(width))
