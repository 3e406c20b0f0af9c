"""Rows: windows and whole documents, with and without a loss mask, each against a plain loop."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.data.batches import IGNORED, PADDING, Row, heldout_batches, rows_of
from ep_engine.data.tokens import TokenFile, mask_prefix, write_masked_token_file, write_token_file
from ep_engine.errors import UserError


def token_file(folder: Path, lengths: list[int], *, masked: bool = False) -> TokenFile:
    """Documents of these lengths; the token at position i of the stream is i + 1, learnt if i is even."""
    ids = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    if masked:
        write_masked_token_file(folder / "t", [(d, (d % 2).astype(np.uint8)) for d in ids], 70_000)
    else:
        write_token_file(folder / "t", ids, 70_000)
    return TokenFile(folder / "t")


def listed(row: Row) -> list[list[int]]:
    return [column.tolist() for column in row]


def test_whole_documents_by_hand(tmp_path: Path) -> None:
    rows = rows_of(token_file(tmp_path, [2, 2, 3, 0, 7, 1]), 5, "documents")
    x, p = IGNORED, PADDING
    assert rows.num_rows == 4
    assert listed(rows.read(0)) == [[1, 2, 3, 4, 0], [2, x, 4, x, x], [0, 0, 1, 1, p]]
    assert listed(rows.read(1)) == [[5, 6, 7, 0, 0], [6, 7, x, x, x], [2, 2, 2, p, p]]
    assert listed(rows.read(2)) == [[8, 9, 10, 11, 12], [9, 10, 11, 12, x], [4, 4, 4, 4, 4]]  # loses 13 and 14
    assert listed(rows.read(3)) == [[15, 0, 0, 0, 0], [x] * 5, [5, p, p, p, p]]
    assert rows.num_cut == 1  # type: ignore[attr-defined]
    each = rows_of(rows.tokens, 5, "padded")
    assert each.num_rows == 5
    assert listed(each.read(1)) == [[3, 4, 0, 0, 0], [4, x, x, x, x], [1, 1, p, p, p]]


def test_a_mask_says_what_is_learnt(tmp_path: Path) -> None:
    tokens, x = token_file(tmp_path, [3, 4], masked=True), IGNORED
    assert listed(rows_of(tokens, 3, "stream").read(0))[:2] == [[1, 2, 3], [x, 3, x]]
    assert listed(rows_of(tokens, 3, "stream").read(1))[:2] == [[4, 5, 6], [5, x, 7]]
    assert listed(rows_of(tokens, 8, "documents").read(0))[:2] == [[1, 2, 3, 4, 5, 6, 7, 0], [x, 3, x, 5, x, 7, x, x]]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any),
    length=st.integers(1, 10),
    masked=st.booleans(),
    padded=st.booleans(),
)
def test_every_document_is_in_one_row_with_its_own_targets(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, masked: bool, padded: bool
) -> None:
    tokens = token_file(tmp_path_factory.mktemp("rows"), lengths, masked=masked)
    rows = rows_of(tokens, length, "padded" if padded else "documents")
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row in range(rows.num_rows):
        inputs, targets, documents = rows.read(row)
        assert (targets[documents == PADDING] == IGNORED).all()
        for document in set(documents.tolist()) - {PADDING}:
            assert document not in found
            at = documents == document
            found[document] = inputs[at].tolist(), targets[at].tolist()
        assert not padded or len(set(documents.tolist()) - {PADDING}) == 1
    begins = np.concatenate(([0], np.cumsum(lengths)))
    for document, count in enumerate(lengths):
        ids = [int(begins[document]) + 1 + i for i in range(min(count, length))]
        learnt = [i if not masked or i % 2 else IGNORED for i in ids[1:]] + [IGNORED] * bool(ids)
        assert found.get(document, ([], [])) == (ids, learnt)
    if not padded:  # no two rows that follow each other would fit into one
        filled = [int((rows.read(row)[2] != PADDING).sum()) for row in range(rows.num_rows)]
        first = [int((rows.read(row)[2] == rows.read(row)[2][0]).sum()) for row in range(rows.num_rows)]
        assert all(a + b > length for a, b in zip(filled, first[1:], strict=False))


def test_a_mask_of_other_documents_is_refused(tmp_path: Path) -> None:
    token_file(tmp_path, [3, 4], masked=True)
    write_token_file(mask_prefix(tmp_path / "t"), [np.array([1, 0, 1])], 2)
    with pytest.raises(UserError, match=r"t_loss_mask\.bin has 3 tokens in 1 documents, and .*t\.bin 7 in 2; tokenise"):
        TokenFile(tmp_path / "t")
    mask_prefix(tmp_path / "t").with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"t_loss_mask\.bin does not exist"):
        TokenFile(tmp_path / "t")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, [3, 4])
    with pytest.raises(UserError, match=r"t\.bin gives 2 rows of 4 tokens, but 3 are asked for; give more text"):
        heldout_batches(tokens, sequence_length=4, batch_size=3, num_batches=1, packing="documents")
