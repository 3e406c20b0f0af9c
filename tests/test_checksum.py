"""Checksums of parts, however a tensor is cut, add up to that of the whole, and any change shows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_engine import checksum, reference

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), row=st.integers(0, 9), column=st.integers(0, 9))
def test_blocks_add_up(rows: int, columns: int, row: int, column: int) -> None:
    whole = torch.randn(rows, columns)
    row, column = min(row, rows), min(column, columns)
    parts = []
    for top, bottom in ((0, row), (row, rows)):
        for left, right in ((0, column), (column, columns)):
            block = whole[top:bottom, left:right]
            parts.append(checksum.checksum(block, first=top * columns + left, pitch=columns))
    assert checksum.add(*parts) == checksum.checksum(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_it_is_the_plain_formula_over_however_many_threads(dtype: torch.dtype) -> None:
    whole = (torch.randn(700, 101) * 9).to(dtype)
    bits = whole.view(BITS[dtype.itemsize]).numpy().ravel()
    places = np.arange(bits.size, dtype=np.uint64)
    assert checksum.checksum(whole) == reference.checksum(bits, places)
    assert checksum.checksum(whole, first=1 << 40) == reference.checksum(bits, places + np.uint64(1 << 40))
    rows = [checksum.checksum(whole[:31]), checksum.checksum(whole[31:], first=31 * 101)]
    assert checksum.add(*rows) == checksum.checksum(whole)
    columns = [checksum.checksum(whole[:, :1], pitch=101), checksum.checksum(whole[:, 1:], first=1, pitch=101)]
    assert checksum.add(*columns) == checksum.checksum(whole)


@given(st.permutations(range(7)), st.integers(0, 7), st.sampled_from([0, 1]))
def test_the_unordered_one_is_blind_to_order_and_to_nothing_else(order: list[int], cut: int, dim: int) -> None:
    whole = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    parts = whole.index_select(dim, torch.tensor(order)).split([cut, 7 - cut], dim=dim)
    total = checksum.unordered_checksum(whole, dim=dim)
    assert checksum.add(*(checksum.unordered_checksum(part, dim=dim) for part in parts)) == total
    assert checksum.unordered_checksum(whole.roll(1, dims=1 - dim), dim=dim) != total
    twice = whole.index_select(dim, torch.tensor([0, 0, *range(2, 7)]))
    assert checksum.unordered_checksum(twice, dim=dim) != total


def test_a_bit_a_swap_and_a_shift_show() -> None:
    whole = torch.arange(12.0).view(3, 4)
    changed = [whole.flip(0), whole.t().contiguous(), whole.roll(1), whole + torch.eye(3, 4) * 1e-6]
    sums = [checksum.checksum(tensor) for tensor in (whole, *changed, whole[:, :3])]
    sums.append(checksum.checksum(whole, first=1))
    assert len(set(sums)) == len(sums)
