"""A Hugging Face model folder, opened for reading: config.json, and weights in one file or in shards with an index.

Opening reads headers only and checks that the index and the shards agree; a tensor is read, memory-mapped, when asked
for. `.bin` files are unpickled with `weights_only`, so they cannot run code.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep_engine.errors import UserError

# In transformers' order of preference.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Shard:
    """One opened weight file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | str]  # or the name of one that the engine does not have
    tensor: Callable[[str], Tensor]


@dataclass(frozen=True)
class HFDirectory:
    """An opened folder. `shard_of` names the shard of every key that the weight files hold."""

    folder: Path
    config: Mapping[str, Any]
    shard_of: Mapping[str, Shard]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.shard_of[key].shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone; UserError if it is no floating dtype of the engine."""
        dtype = self.shard_of[key].dtypes[key]
        if not isinstance(dtype, torch.dtype):
            raise UserError(
                f"{key} in {self.shard_of[key].path} has dtype {dtype}, expected one of "
                f"{', '.join(str(dtype) for dtype in _DTYPES.values())}; convert an unquantised copy of the model"
            )
        return dtype

    def tensor(self, key: str) -> Tensor:
        """A tensor in the dtype of the file, memory-mapped."""
        return self.shard_of[key].tensor(key)


def open_hf_directory(folder: Path) -> HFDirectory:
    """Open a folder that `save_pretrained` could have written.

    Raises:
        UserError: no config.json or weights; a shard is missing, truncated or holds other keys than the index says; the
            index points outside the folder.
    """
    config = read_json(folder / "config.json")
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights, expected one of {', '.join(_FILES)}; copy them beside config.json")
    if not found.endswith(".json"):
        shard = _open_shard(folder / found)
        return HFDirectory(folder, config, dict.fromkeys(shard.shapes, shard))
    return HFDirectory(folder, config, _open_index(folder / found))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a Hugging Face model folder (no {path.name}); give one") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}; copy the file again")
    return value


def _open_index(path: Path) -> dict[str, Shard]:
    """Every key and its shard; index and shards must name the same keys."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{path} has no weight_map from keys to file names; copy the file again")
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(path, name)
    shards = {name: _open_shard(path.parent / name) for name in names}
    shard_of = {key: shards[name] for key, name in weight_map.items()}
    for key, shard in shard_of.items():
        if key not in shard.shapes:
            raise UserError(f"{path.name} says that {shard.path} holds {key}, but it does not; copy both files again")
    for shard in shards.values():
        for key in shard.shapes:
            if shard_of.get(key) is not shard:
                raise UserError(f"{shard.path} holds {key}, but {path.name} does not say so; copy both files again")
    return shard_of


def _check_inside(index: Path, name: str) -> None:
    """Only the name is judged: files of the Hugging Face cache are links to elsewhere, and that is the user's doing."""
    normal = os.path.normpath(name)
    if os.path.isabs(name) or normal.split(os.sep)[0] in ("..", ".") or "\0" in name:
        raise UserError(f"{index} points to {name!r}, which is outside of its folder; do not use this model")


def _open_shard(path: Path) -> Shard:
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise UserError(f"shard {path} is missing; copy it beside its index")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickled(path)


def _open_safetensors(path: Path) -> Shard:
    try:
        file: Any = safe_open(path, framework="pt")  # its stubs are not typed
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        dtypes = {key: _DTYPES.get(part.get_dtype(), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from None
    return Shard(path, shapes, dtypes, file.get_tensor)


def _open_pickled(path: Path) -> Shard:
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is truncated, damaged or holds more than tensors ({str(error).splitlines()[0]}); copy it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} must hold a dictionary of tensors by name; save the model's state_dict")
    known = _DTYPES.values()
    dtypes = {key: tensor.dtype if tensor.dtype in known else str(tensor.dtype) for key, tensor in state.items()}
    return Shard(path, {key: tuple(tensor.shape) for key, tensor in state.items()}, dtypes, state.__getitem__)
