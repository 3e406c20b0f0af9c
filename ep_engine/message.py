"""The format of what travels for one row: the row itself, then words of 32 bits (slots, weights), in one piece.

One exchange then carries them all. A message is a multiple of 16 bytes long, so that rows stay aligned for vectors.

Shape letters:  S messages   B bytes of one message
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 16
_WORD = 4


@dataclass(frozen=True)
class Message:
    """A row of `dim` elements of `dtype`, then `num_words` words."""

    dim: int
    dtype: torch.dtype
    num_words: int = 0

    @property
    def num_bytes(self) -> int:
        """B."""
        return _round_up(self._first_word + _WORD * self.num_words, _ALIGNMENT)

    @property
    def _first_word(self) -> int:
        return _round_up(self.dim * self.dtype.itemsize, _WORD)

    def rows(self, messages_SB: Tensor) -> Tensor:
        """The rows (S, dim), a view."""
        return messages_SB[:, : self.dim * self.dtype.itemsize].view(self.dtype)

    def words(self, messages_SB: Tensor, dtype: torch.dtype, first: int, count: int) -> Tensor:
        """Words [first, first + count) as int32 or float32, (S, count), a view."""
        begin = self._first_word + _WORD * first
        return messages_SB[:, begin : begin + _WORD * count].view(dtype)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
