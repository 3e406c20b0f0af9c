"""A checksum that slices can add up to: the sum over elements of a hash of (position, bits), modulo 2**64.

Because it is a sum, the ranks that hold parts of a tensor each sum their own part, and the parts add up to the
checksum of the whole, at any sharding. Because the hash is keyed by the position in the whole tensor, swapped rows,
swapped experts and a shifted slice all change it. It finds accidents; it is no defence against an attacker.
"""

import torch
from torch import Tensor

from ep_engine import ops

_MODULUS = 1 << 64


def checksum(tensor: Tensor, *, first: int = 0, pitch: int | None = None) -> int:
    """Sum of mix(position, bits) over the elements of `tensor`, in 0..2**64-1: csrc/checksum.h.

    Args:
        tensor: any shape and dtype; it counts as the run of elements first, first + 1, ... of the whole tensor.
        first: position of its first element in the whole, flattened row by row.
        pitch: elements from one row of the whole to the next, where `tensor` is a matrix of parts of its rows.
    """
    elements = tensor.detach().cpu().contiguous()
    columns = max(elements.numel() if pitch is None else elements.shape[1], 1)
    row_step = columns if pitch is None else pitch
    return ops.checksum(elements, columns, first=first, row_step=row_step, column_step=1)


def unordered_checksum(matrix: Tensor, *, dim: int) -> int:
    """A checksum that is blind to the order of the rows (dim 0) or columns (dim 1) of a matrix, not to their number.

    Those of parts that have each row, or column, once add up to that of the whole, however they are shared out.
    """
    row_step, column_step = (0, 1) if dim == 0 else (1, 0)
    elements = matrix.detach().cpu().contiguous()
    if dim == 0 and elements.shape[1] * elements.element_size() % 8 == 0:
        elements = elements.view(torch.int64)  # rows stay whole: fewer, wider elements
    return ops.checksum(elements, max(elements.shape[1], 1), first=0, row_step=row_step, column_step=column_step)


def add(*parts: int) -> int:
    """Checksum of a whole from those of its disjoint slices."""
    return sum(parts) % _MODULUS
