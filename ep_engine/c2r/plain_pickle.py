"""Pickles of numbers, lists and numpy's arrays, read without running anything.

A pickle can run any code when it is read, and numpy's own parts crash on states that they did not write. So a pickle
here may name numpy's array, its dtype, its scalar and what puts an array together, and gets stand-ins of ours for them,
from which arrays are made after all has been checked. Anything else is refused before it is looked up.
"""

import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from ep_engine.errors import UserError

_NUMBERS = re.compile(r"[iu][1248]|f[248]|b1")


def read_plain_pickle(path: Path) -> Any:
    """What a file holds; UserError, and nothing run, for any other pickle."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give another file") from None
    return plain_pickle(data, path)


def plain_pickle(data: bytes, path: Path) -> Any:
    """The same of bytes that were read from `path`."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # Memory for so many numbers would be made at once.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
                raise ValueError(f"it wants to remember {argument} things")
        return _plain(_Restricted(io.BytesIO(data)).load())
    except _RefusedError as error:
        raise UserError(
            f"{path} wants to run {error}; here it may hold numbers, lists and numpy's arrays alone, nothing was run"
        ) from None
    except Exception as error:  # of damaged data an unpickler may say anything
        raise UserError(f"{path} cannot be read as a pickle ({error}); give another file") from None


class _RefusedError(Exception):
    """A pickle named something."""


class _Dtype:
    """Stands for numpy.dtype: a kind and a size, and the order of its bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        if not _NUMBERS.fullmatch(name):
            raise ValueError(f"an array of {name!r} holds no numbers")
        self._name, self._order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"{state[1]!r} is no order of bytes")
        self._order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """What it stands for."""
        return np.dtype(self._order + self._name)


class _Array:
    """Stands for an array: until it is told its state it is nothing."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise ValueError("an array must be bytes of a dtype")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{shape!r} is no shape")
    of = dtype.numpy()
    if math.prod(shape) * of.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no array of shape {shape}")
    found = np.frombuffer(data, dtype=of).reshape(shape, order=order)
    return found.astype(of.newbyteorder("="))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    """From protocol 5 on."""
    made = _Array()
    made.value = _array(data, dtype, shape, order)
    return made


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """How bytes are written up to protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes must be written as latin1")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as numpy 1 called it
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"{module}.{name}")
        return _STAND_INS[module, name]


def _plain(value: Any) -> Any:
    """With arrays in the place of what stands for them."""
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without a state")
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(one) for one in value)
    if value is None or isinstance(value, (int, float, str, bytes, np.generic)):
        return value
    raise ValueError(f"{type(value).__name__} is neither a number, a list nor an array")
