"""A checksum that slices can add up to: the sum over elements of a hash of (position, bits), modulo 2**64.

Because it is a sum, the ranks that hold parts of a tensor each sum their own part, and the parts add up to the
checksum of the whole, at any sharding. Because the hash is keyed by the position in the whole tensor, swapped rows,
swapped experts and a shifted slice all change it. It finds accidents; it is no defence against an attacker.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MODULUS = 1 << 64
_CHUNK = 1 << 20  # elements hashed at a time: bounds the scratch memory to some tens of MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor, *, first: int = 0, pitch: int | None = None) -> int:
    """Sum of mix(position, bits) over the elements of `tensor`, in 0..2**64-1.

    Args:
        tensor: any shape and dtype; it counts as the run of elements first, first + 1, ... of the whole tensor.
        first: position of its first element in the whole, flattened row by row.
        pitch: elements from one row of the whole to the next, where `tensor` is a matrix of parts of its rows.
    """
    bits = tensor.detach().cpu().contiguous().view(-1).view(_BITS[tensor.element_size()]).numpy()
    total = 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK].astype(np.uint64)  # sign extension is harmless: the map is one to one
        position = np.arange(start, start + part.size, dtype=np.uint64)
        if pitch is not None:
            row, column = np.divmod(position, np.uint64(tensor.shape[1]))
            position = row * np.uint64(pitch) + column
        position += np.uint64(first)
        total += int(_mix(part ^ _mix(position)).sum(dtype=np.uint64))
    return total % _MODULUS


def add(*parts: int) -> int:
    """Checksum of a whole from those of its disjoint slices."""
    return sum(parts) % _MODULUS


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
