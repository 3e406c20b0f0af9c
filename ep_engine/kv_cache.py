"""Keys and values that a decoder has computed already, so that a new token costs one pass over itself.

Rows may have prompts of different lengths: they stand right-aligned, with padding before the shorter ones.

Shape letters:  B rows   S new positions   C positions with the new ones   G key/value heads   d dim of a head
"""

import torch
from torch import Tensor, nn


class KVCache:
    """What every attention of a model has seen of the rows of one batch, on one device.

    Args:
        pad_B: int64, positions of padding before the first token of each row.
        capacity: positions that a row may come to, padding among them.
    """

    def __init__(self, pad_B: Tensor, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._pad_B = pad_B
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def begin(self, new: int, window: int | None) -> Tensor:
        """Make room for `new` positions in every row, of which `positions_BS` then are the numbers.

        Returns:
            Who sees whom, (B, 1, S, C) bool: all before it in its row and itself, or as many of those as a window has.
        """
        assert self.length + new <= self.capacity, f"{self.length} + {new} positions of {self.capacity}"
        columns_C = torch.arange(self.length + new, device=self._pad_B.device)
        columns_S1 = columns_C[self.length :].unsqueeze(1)
        self.positions_BS = (columns_S1.T - self._pad_B.unsqueeze(1)).clamp(min=0)
        seen_BSC = (columns_C <= columns_S1) & (columns_C >= self._pad_B.view(-1, 1, 1))
        if window is not None:
            seen_BSC &= columns_C > columns_S1 - window
        self.length += new
        # Padding sees itself: a softmax over nothing would not be a number, and the next layer would hand it on.
        return (seen_BSC | (columns_C == columns_S1)).unsqueeze(1)

    def extend(self, of: nn.Module, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values of one attention; returns all that it has, (B, G, C, d)."""
        if of not in self._kept:
            shape = (*k_BGSd.shape[:2], self.capacity, k_BGSd.shape[3])
            self._kept[of] = k_BGSd.new_empty(shape), v_BGSd.new_empty(shape)
        first = self.length - k_BGSd.shape[2]
        for kept, new in zip(self._kept[of], (k_BGSd, v_BGSd), strict=True):
            kept[:, :, first : self.length] = new
        k, v = self._kept[of]
        return k[:, :, : self.length], v[:, :, : self.length]
