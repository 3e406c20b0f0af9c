"""Token files in Megatron's `.bin/.idx` format.

    corpus (text) -> [token files] -> batches -> model

A token file is one long stream: its documents, each closed by the end-of-text token, one after another.
"""

import math
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.errors import UserError
from ep_engine.output import whole_file

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of documents + 1
_INDEX_MAGIC = (b"MMIDIDX\x00\x00", 1)
_INTEGER_CODES = (1, 2, 3, 4, 5, 8)  # 6 and 7 are floats: not tokens
_TOKENS_PER_SCAN = 1 << 20  # whole-file scans hold 8 MiB at a time


def _indexed_dataset() -> ModuleType:
    """megatron-core's file format. Imported only when token files are touched: it costs seconds, and it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    module: ModuleType = indexed_dataset
    return module


def write_token_file(prefix: Path, documents: Iterable[NDArray[np.integer]], vocab_size: int) -> tuple[int, int]:
    """Write `prefix`.bin and `prefix`.idx, replacing an older pair; both appear whole or not at all.

    Args:
        prefix: Path without suffix.
        documents: Each (num_tokens,) integers, ids in [0, vocab_size), end-of-text included. Read once, one at a time.
        vocab_size: Below 65500 the file holds uint16, else int32 (Megatron's own rule).

    Returns:
        Number of tokens and number of documents written, both at least 1.

    Raises:
        UserError: the documents hold no token, or one has an id outside [0, vocab_size).
        Fault: the disk is full.
    """
    with _pair(prefix, vocab_size, (mask_prefix(prefix),)) as add:
        for document in documents:
            _check_ids(document, vocab_size, f"document {len(add.lengths)} for {prefix}.bin")
            add(document)
    return sum(add.lengths), len(add.lengths)


def write_masked_token_file(
    prefix: Path, documents: Iterable[tuple[NDArray[np.integer], NDArray[np.uint8]]], vocab_size: int
) -> tuple[int, int]:
    """The same, and beside it a pair of bytes: 1 for a token that is to be learnt, 0 for one that is only read.

    The mask is a token file of its own, with the same documents, so Megatron's reader reads it too. Its names are of
    `mask_prefix`.
    """
    # What is closed first appears first: tokens never appear without their mask.
    with _pair(prefix, vocab_size) as add, _pair(mask_prefix(prefix), None) as add_mask:
        for document, mask in documents:
            assert len(document) == len(mask), f"{len(document)} tokens, {len(mask)} in their mask"
            _check_ids(document, vocab_size, f"document {len(add.lengths)} for {prefix}.bin")
            add(document)
            add_mask(mask)
    return sum(add.lengths), len(add.lengths)


def mask_prefix(prefix: Path) -> Path:
    """Name, without suffix, of the loss mask of a token file."""
    return prefix.with_name(f"{prefix.name}_loss_mask")


class _Adding:
    """Adds documents to a file."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.lengths: list[int] = builder.sequence_lengths

    def __call__(self, document: NDArray[np.integer]) -> None:
        self._builder.add_document(document, [len(document)])


@contextmanager
def _pair(prefix: Path, vocab_size: int | None, outdated: Sequence[Path] = ()) -> Iterator[_Adding]:
    """A pair that is being written; None: of bytes. Pairs that go with the old one are deleted with it."""
    megatron = _indexed_dataset()
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    dtype = np.uint8 if vocab_size is None else megatron.DType.optimal_dtype(vocab_size)
    with whole_file(idx_path) as idx, whole_file(bin_path) as bin_:
        builder = megatron.IndexedDatasetBuilder(str(bin_), dtype=dtype)
        try:
            yield _Adding(builder)
        finally:
            builder.data_file.close()
        if sum(builder.sequence_lengths) == 0:
            raise UserError(f"token file {bin_path} would hold 0 tokens; give at least one readable text")
        builder.finalize(str(idx))
        # The new .bin takes its place first: with the old .idx gone, a stop between the two renames leaves a missing
        # file, which is refused, and never a pair that does not belong together.
        idx_path.unlink(missing_ok=True)
        for old in outdated:
            Path(f"{old}.idx").unlink(missing_ok=True)
            Path(f"{old}.bin").unlink(missing_ok=True)


class TokenFile:
    """A memory-mapped `.bin/.idx` pair read as one stream of tokens.

    Args:
        prefix: Path without suffix.
        vocab_size: Ids outside [0, vocab_size) are refused when they are read; None: any id is returned.

    Attributes:
        num_tokens: Length of the stream, at least 1.
        num_documents: Documents it is made of.
        document_ends: (num_documents,) int64, ascending, where each ends in the stream.
        mask: The loss mask that lies beside it; None: every token is to be learnt.

    Raises:
        UserError: a file of the pair is missing, cut short, empty, no Megatron index, or not of integers; or its mask
            is of other documents.
    """

    def __init__(self, prefix: Path, *, vocab_size: int | None = None) -> None:
        self.bin_path = Path(f"{prefix}.bin")
        # Checked before megatron-core opens the pair: it answers by bare asserts, or maps a short .bin without a word.
        _check_index(self.bin_path, Path(f"{prefix}.idx"))
        self._dataset = _indexed_dataset().IndexedDataset(str(prefix))
        self._vocab_size = vocab_size
        self._dtype: np.dtype[np.integer] = np.dtype(self._dataset.index.dtype)
        self.num_tokens = int(self._dataset.sequence_lengths.sum(dtype=np.int64))
        self.num_documents = len(self._dataset.document_indices) - 1
        lengths = np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)
        # A document is one or several sequences; an empty one at the start ends before the first token.
        self.document_ends = np.concatenate(([0], lengths))[self._dataset.document_indices[1:]]

        num_bytes, expected_bytes = self.bin_path.stat().st_size, self.num_tokens * self._dtype.itemsize
        if num_bytes != expected_bytes:
            raise UserError(
                f"token file {self.bin_path} has {num_bytes} bytes, but its .idx describes {expected_bytes}; "
                "the pair is damaged or mixed: tokenise again"
            )
        self.mask: TokenFile | None = self._mask(mask_prefix(prefix))

    def _mask(self, prefix: Path) -> "TokenFile | None":
        if not (Path(f"{prefix}.idx").exists() or Path(f"{prefix}.bin").exists()):
            return None
        mask = TokenFile(prefix, vocab_size=2)
        if not np.array_equal(mask.document_ends, self.document_ends):
            raise UserError(
                f"loss mask {mask.bin_path} has {mask.num_tokens} tokens in {mask.num_documents} documents, and "
                f"{self.bin_path} {self.num_tokens} in {self.num_documents}; tokenise again"
            )
        return mask

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Copy tokens `start` .. `start + count - 1` of the stream; both ends must lie inside it.

        A copy, because a view would outlive the mapping when the TokenFile goes away.
        """
        assert 0 <= start <= start + count <= self.num_tokens, f"[{start}, +{count}) of {self.num_tokens} tokens"
        view = self._dataset.bin_reader.read(self._dtype, count, start * self._dtype.itemsize)
        ids = np.array(view, dtype=np.int64)
        if self._vocab_size is not None:
            _check_ids(ids, self._vocab_size, f"token file {self.bin_path}", start)
        return ids

    def documents(self, start: int, count: int) -> NDArray[np.int64]:
        """The number, in [0, num_documents), of the document of each of `count` tokens from `start` on."""
        return np.searchsorted(self.document_ends, np.arange(start, start + count), side="right")

    def count_ids(self, vocab_size: int, *, most: int | None = None) -> NDArray[np.int64]:
        """Count how often each id occurs, in all tokens or the first so many: (vocab_size,) int64.

        Raises:
            UserError: an id lies outside [0, vocab_size).
        """
        counts = np.zeros(vocab_size, dtype=np.int64)
        end = self.num_tokens if most is None else min(most, self.num_tokens)
        for start in range(0, end, _TOKENS_PER_SCAN):
            ids = self.read(start, min(_TOKENS_PER_SCAN, end - start))
            _check_ids(ids, vocab_size, f"token file {self.bin_path}", start)
            counts += np.bincount(ids, minlength=vocab_size)
        return counts


def unigram_entropy(tokens: TokenFile, vocab_size: int) -> float:
    """Return the entropy of the file's own token frequencies, in nats per token.

    Asked of held-out tokens this is the loss of the best of all models that ignore context, fitted to the very tokens
    it is scored on: a harder bar than the frequencies of the training tokens would set.

    Raises:
        UserError: an id lies outside [0, vocab_size).
    """
    counts = tokens.count_ids(vocab_size)
    frequencies = counts[counts > 0] / tokens.num_tokens
    return -math.fsum(frequencies * np.log(frequencies))


def _check_ids(ids: NDArray[np.integer], vocab_size: int, where: str, start: int = 0) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise UserError(
            f"{where} holds id {ids[at]} at position {start + at}, outside [0, {vocab_size}) of the vocabulary; "
            "use the tokenizer that the model was made for"
        )


def _check_index(bin_path: Path, idx_path: Path) -> None:
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(f"token file {path} does not exist; give the name that a .bin and an .idx share")
    with idx_path.open("rb") as index:
        head = index.read(_INDEX_HEADER.size)
    if len(head) < _INDEX_HEADER.size:
        raise UserError(f"token index {idx_path} is cut short: {len(head)} bytes; tokenise again")
    magic, version, code, num_sequences, num_document_ends = _INDEX_HEADER.unpack(head)
    if (magic, version) != _INDEX_MAGIC or code not in _INTEGER_CODES:
        raise UserError(
            f"token index {idx_path} is no Megatron index of integers (magic {magic!r}, version {version}, "
            f"dtype code {code}); tokenise again"
        )
    # int32 length and int64 offset per sequence, int64 sequence number per document.
    num_bytes, needed = idx_path.stat().st_size, _INDEX_HEADER.size + 12 * num_sequences + 8 * num_document_ends
    if num_bytes < needed:
        raise UserError(f"token index {idx_path} is cut short: {num_bytes} bytes of {needed}; tokenise again")
    if bin_path.stat().st_size == 0:  # an empty file cannot be mapped
        raise UserError(f"token file {bin_path} is empty ({num_sequences} documents in its .idx); tokenise again")
