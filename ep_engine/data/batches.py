"""Batches: rows of a token file, and which of them a step reads.

    corpus (text) -> token files -> [batches] -> model

A row is a window of the stream, or whole documents with padding behind them (`Packing`). Window w of length S holds
stream positions w*S .. w*S + S: inputs are its first S tokens, targets its last S, so every token but the first of the
stream is a target exactly once. A target that is not to be learnt is IGNORED.

Shape letters:  B rows of the global batch   P ranks that share it   R = B / P rows of one rank   S sequence length
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep_engine.config import Packing
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError

IGNORED = -100  # PyTorch's own number for a target without a loss
PADDING = -1  # the document of tokens that fill a row up

_FEISTEL_ROUNDS = 6


class Batch(NamedTuple):
    """Rows of a batch, each (R, S) int64, contiguous."""

    inputs_BS: Tensor
    targets_BS: Tensor  # IGNORED where a token is not to be learnt
    documents_BS: Tensor  # the number of the document of every input token, or PADDING

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(tensor.to(device) for tensor in self))


class Row(NamedTuple):
    """Inputs, targets and documents, each (S,) int64."""

    inputs_S: NDArray[np.int64]
    targets_S: NDArray[np.int64]
    documents_S: NDArray[np.int64]


class Rows(Protocol):
    """The rows of a token file, in its own order."""

    tokens: TokenFile
    num_rows: int

    def read(self, row: int) -> Row:
        """Row 0..num_rows - 1."""


class Windows:
    """Rows that are windows of the stream; they cut documents where they end."""

    def __init__(self, tokens: TokenFile, sequence_length: int) -> None:
        self.tokens, self._length = tokens, sequence_length
        self.num_rows = (tokens.num_tokens - 1) // sequence_length

    def read(self, row: int) -> Row:
        """See `Rows`."""
        at, length = row * self._length, self._length
        ids = self.tokens.read(at, length + 1)
        targets = ids[1:]
        if self.tokens.mask is not None:
            targets = np.where(self.tokens.mask.read(at + 1, length) == 1, targets, IGNORED)
        return Row(ids[:-1], targets, self.tokens.documents(at, length))


class WholeDocuments:
    """Rows of documents that follow each other and fit, whole, with padding behind; longer ones are cut at the end.

    The first token of a document is no target, and neither is what its mask leaves out.

    Args:
        tokens: The documents. Empty ones are left out.
        sequence_length: S.
        one_each: A row holds one document.

    Attributes:
        num_cut: Documents that are longer than a row.
    """

    def __init__(self, tokens: TokenFile, sequence_length: int, *, one_each: bool) -> None:
        begins = np.concatenate(([0], tokens.document_ends[:-1]))
        self._documents = np.flatnonzero(tokens.document_ends > begins)
        self._begins = begins[self._documents]
        whole = tokens.document_ends[self._documents] - self._begins
        self._lengths = np.minimum(whole, sequence_length)
        self.tokens, self._length = tokens, sequence_length
        self.num_cut = int((whole > sequence_length).sum())
        self._firsts = np.arange(len(whole) + 1) if one_each else _greedy(self._lengths, sequence_length)
        self.num_rows = len(self._firsts) - 1

    def read(self, row: int) -> Row:
        """See `Rows`."""
        inputs, targets, documents = (np.full(self._length, value) for value in (0, IGNORED, PADDING))
        at = 0
        for document in range(self._firsts[row], self._firsts[row + 1]):
            begin, length = int(self._begins[document]), int(self._lengths[document])
            ids = self.tokens.read(begin, length)
            learnt = ids[1:]
            if self.tokens.mask is not None:
                learnt = np.where(self.tokens.mask.read(begin, length)[1:] == 1, learnt, IGNORED)
            inputs[at : at + length] = ids
            targets[at : at + length - 1] = learnt
            documents[at : at + length] = self._documents[document]
            at += length
        return Row(inputs, targets, documents)


def _greedy(lengths: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """First document of every row, and the end: as many as fit, in their order, so a row is one place of a file."""
    before = np.concatenate(([0], np.cumsum(lengths)))
    firsts = [0]
    while firsts[-1] < len(lengths):
        firsts.append(int(np.searchsorted(before, before[firsts[-1]] + most, side="right")) - 1)
    return np.array(firsts, dtype=np.int64)


def rows_of(tokens: TokenFile, sequence_length: int, packing: Packing) -> Rows:
    """The rows of a token file: windows of the stream, whole documents, or one document each."""
    if packing == "stream":
        return Windows(tokens, sequence_length)
    return WholeDocuments(tokens, sequence_length, one_each=packing == "padded")


class Batches:
    """The training stream: all windows of a token file in a new seeded order every epoch, without end.

    A batch is a function of (step, seed) alone, so a run resumes from the step number. Rows run on over the end of an
    epoch: each window comes exactly once per `num_windows` rows, whatever the batch size. The order comes from a
    permutation computed per row, so memory does not grow with the corpus.

    Args:
        tokens: The stream.
        sequence_length: S, at least 1.
        batch_size: B, rows of the global batch, at least 1.
        seed: Any int; another seed is another order.

    Raises:
        UserError: the stream has fewer windows than one batch.
    """

    def __init__(self, tokens: TokenFile, *, sequence_length: int, batch_size: int, seed: int) -> None:
        self._rows = Windows(tokens, sequence_length)
        check_rows(self._rows, sequence_length, batch_size)
        self.num_windows = self._rows.num_rows
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """Return this rank's rows of global batch `step`.

        Rank r holds rows r*R .. (r+1)*R - 1: the ranks' rows in rank order are the same batch for every P.

        Raises:
            UserError: `num_ranks` does not divide the batch size.
        """
        rows = rows_of_rank(self._batch_size, rank, num_ranks)
        numbers = (step * self._batch_size + row for row in rows)
        return stacked([self._rows.read(self.window_of_row(number)) for number in numbers])

    def window_of_row(self, row: int) -> int:
        """Return the window, in [0, num_windows), that stands at `row` >= 0 of the endless stream of rows."""
        epoch, position = divmod(row, self.num_windows)
        return shuffled(position, self.num_windows, f"{self._seed}/{epoch}")


def heldout_batches(
    tokens: TokenFile,
    *,
    sequence_length: int,
    batch_size: int,
    num_batches: int,
    rank: int = 0,
    num_ranks: int = 1,
    packing: Packing = "stream",
) -> Iterator[Batch]:
    """Return this rank's rows of the first `num_batches` batches of rows in the file's order, as `Batches.batch` does.

    Raises:
        UserError: at the call, not at the first batch: fewer rows than asked for, or B is no multiple of P.
    """
    rows = rows_of(tokens, sequence_length, packing)
    check_rows(rows, sequence_length, num_batches * batch_size)
    mine = rows_of_rank(batch_size, rank, num_ranks)
    return (stacked([rows.read(i * batch_size + row) for row in mine]) for i in range(num_batches))


def check_rows(rows: Rows, sequence_length: int, needed: int) -> None:
    """UserError if a token file has fewer rows than are needed."""
    if rows.num_rows < needed:
        kind = "windows" if isinstance(rows, Windows) else "rows"
        raise UserError(
            f"token file {rows.tokens.bin_path} gives {rows.num_rows} {kind} of {sequence_length} tokens, "
            f"but {needed} are asked for; give more text, or a smaller batch or sequence length"
        )


def rows_of_rank(batch_size: int, rank: int, num_ranks: int) -> range:
    """Which of the rows of a batch a rank reads; UserError if they do not share it evenly."""
    assert 0 <= rank < num_ranks, f"rank {rank} of {num_ranks}"
    if batch_size % num_ranks != 0:
        raise UserError(
            f"batch size ({batch_size}) must be a multiple of the number of data ranks ({num_ranks}): "
            "each rank reads the same number of rows"
        )
    per_rank = batch_size // num_ranks
    return range(rank * per_rank, (rank + 1) * per_rank)


def stacked(rows: Sequence[Row]) -> Batch:
    """Rows as a batch."""
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def shuffled(position: int, num: int, key: str) -> int:
    """Return where a permutation of range(num), chosen by `key`, sends `position`.

    A Feistel network permutes the 4^h >= num numbers of 2h bits whatever its round function; following the cycle until
    it re-enters range(num) restricts that to a permutation of range(num). Four steps on average, at most.
    """
    half_bits = max(1, ((num - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for round_ in range(_FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        position = left << half_bits | right
        if position < num:
            return position
