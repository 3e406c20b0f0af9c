"""Checksums of parts, however a tensor is cut, add up to that of the whole, and any change shows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_engine import checksum


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_runs_add_up_over_the_chunks_in_which_they_are_hashed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(70, 3).to(dtype)
    expected = checksum.checksum(whole)
    monkeypatch.setattr(checksum, "_CHUNK", 16)
    assert checksum.checksum(whole) == expected
    rows = [checksum.checksum(whole[:31]), checksum.checksum(whole[31:], first=93)]
    assert checksum.add(*rows) == expected
    columns = [checksum.checksum(whole[:, :1], pitch=3), checksum.checksum(whole[:, 1:], first=1, pitch=3)]
    assert checksum.add(*columns) == expected


def test_a_bit_a_swap_and_a_shift_show() -> None:
    whole = torch.arange(12.0).view(3, 4)
    changed = [whole.flip(0), whole.t().contiguous(), whole.roll(1), whole + torch.eye(3, 4) * 1e-6]
    sums = [checksum.checksum(tensor) for tensor in (whole, *changed, whole[:, :3])]
    sums.append(checksum.checksum(whole, first=1))
    assert len(set(sums)) == len(sums)
