"""Token files bit for bit, the batches read from them, and every way a token file can be wrong."""

import math
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.data.batches import Batches, heldout_batches
from ep_engine.data.tokens import TokenFile, unigram_entropy, write_token_file
from ep_engine.errors import UserError


def documents(*ids: list[int]) -> list[NDArray[np.int64]]:
    return [np.array(document, dtype=np.int64) for document in ids]


def counting_stream(folder: Path, num_tokens: int) -> TokenFile:
    """A stream whose token at position i is i, so that a batch shows where it was read."""
    write_token_file(folder / "counting", [np.arange(num_tokens)], vocab_size=70_000)
    return TokenFile(folder / "counting")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return counting_stream(tmp_path_factory.mktemp("stream"), 8 * 50 + 3)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_token_file(tmp_path / "pair", documents([5, 6, 0], [7, 0]), vocab_size=10)
    return tmp_path / "pair"


def test_files_have_megatrons_bytes(pair: Path) -> None:
    assert pair.with_suffix(".bin").read_bytes() == struct.pack("<5H", 5, 6, 0, 7, 0)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)  # version 1, uint16, 2 sequences, 3 ends
    lengths, offsets, ends = struct.pack("<2i", 3, 2), struct.pack("<2q", 0, 6), struct.pack("<3q", 0, 1, 2)
    assert pair.with_suffix(".idx").read_bytes() == header + lengths + offsets + ends


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.lists(st.integers(0, 65_535), max_size=20), min_size=1, max_size=5).filter(any),
    vocab_size=st.sampled_from([65_536, 200_000]),
)
def test_ids_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, ids: list[list[int]], vocab_size: int
) -> None:
    prefix = tmp_path_factory.mktemp("round") / "v1.0"  # a dot in the name is no suffix

    written = write_token_file(prefix, iter(documents(*ids)), vocab_size)

    tokens = TokenFile(prefix)
    assert written == (tokens.num_tokens, tokens.num_documents) == (sum(map(len, ids)), len(ids))
    assert tokens.read(0, tokens.num_tokens).tolist() == [i for document in ids for i in document]


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(4096, 2), (65_499, 2), (65_500, 4), (200_000, 4)])
def test_small_vocabularies_take_two_bytes_per_token(tmp_path: Path, vocab_size: int, bytes_per_token: int) -> None:
    write_token_file(tmp_path / "t", documents([vocab_size - 1, 0, 1]), vocab_size)
    assert (tmp_path / "t.bin").stat().st_size == 3 * bytes_per_token
    assert TokenFile(tmp_path / "t").read(0, 1).tolist() == [vocab_size - 1]


def test_a_failed_write_leaves_the_old_pair(pair: Path) -> None:
    before = {path.name: path.read_bytes() for path in pair.parent.iterdir()}

    def breaks() -> Iterator[NDArray[np.int64]]:
        yield np.array([1, 2, 3])
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_token_file(pair, breaks(), vocab_size=10)
    assert {path.name: path.read_bytes() for path in pair.parent.iterdir()} == before


def test_a_stop_between_the_two_renames_leaves_no_mixed_pair(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def stop_at_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_index)
    with pytest.raises(KeyboardInterrupt):
        write_token_file(pair, documents([1, 1, 0], [2, 0]), vocab_size=10)  # the sizes of the old pair
    with pytest.raises(UserError, match=r"pair\.idx does not exist"):
        TokenFile(pair)


def test_batch_by_hand(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 7)  # windows 0 1 2, 2 3 4, 4 5 6 for S = 2
    batches = Batches(stream, sequence_length=2, batch_size=3, seed=0)
    inputs, targets, _ = batches.batch(0)
    assert batches.num_windows == 3
    assert sorted(inputs.tolist()) == [[0, 1], [2, 3], [4, 5]]
    assert targets.equal(inputs + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_order_of_windows_is_pinned(stream: TokenFile) -> None:
    # A run resumed under a newer engine must meet the same data: change these numbers only with a reason.
    batches = Batches(stream, sequence_length=40, batch_size=2, seed=7)
    assert batches.num_windows == 10
    assert [batches.window_of_row(row) for row in range(10)] == [8, 7, 6, 9, 4, 5, 3, 2, 0, 1]
    assert [batches.window_of_row(row) for row in range(10, 20)] == [5, 0, 7, 3, 9, 4, 8, 6, 1, 2]


@settings(deadline=None)
@given(step=st.integers(0, 10_000), seed=st.integers(-(2**70), 2**70), rows=st.integers(1, 6))
def test_global_batch_does_not_depend_on_the_number_of_ranks(
    stream: TokenFile, step: int, seed: int, rows: int
) -> None:
    batches = Batches(stream, sequence_length=8, batch_size=4 * rows, seed=seed)
    whole = batches.batch(step)
    for num_ranks in (2, 4):
        parts = [batches.batch(step, rank, num_ranks) for rank in range(num_ranks)]
        assert all(len(part.inputs_BS) == 4 * rows // num_ranks for part in parts)
        for at in range(3):
            assert torch.cat([part[at] for part in parts]).equal(whole[at])


def test_a_batch_depends_on_its_step_alone(stream: TokenFile) -> None:
    def fresh() -> Batches:
        return Batches(stream, sequence_length=8, batch_size=4, seed=3)

    used = fresh()
    in_order = [used.batch(step)[0] for step in range(30)]
    for step in (29, 0, 17):
        assert fresh().batch(step)[0].equal(in_order[step])
        assert used.batch(step)[0].equal(in_order[step])


@settings(deadline=None, max_examples=30)
@given(num_windows=st.integers(1, 50), batch_size=st.integers(1, 50), epoch=st.integers(0, 5), seed=st.integers(0, 99))
def test_every_epoch_has_each_window_once(
    stream: TokenFile, num_windows: int, batch_size: int, epoch: int, seed: int
) -> None:
    sequence_length = (stream.num_tokens - 1) // num_windows
    num_windows = (stream.num_tokens - 1) // sequence_length
    batches = Batches(stream, sequence_length=sequence_length, batch_size=min(batch_size, num_windows), seed=seed)
    rows = range(epoch * num_windows, (epoch + 1) * num_windows)
    assert sorted(map(batches.window_of_row, rows)) == list(range(num_windows))


def test_rows_run_on_over_the_end_of_an_epoch(stream: TokenFile) -> None:
    batches = Batches(stream, sequence_length=8, batch_size=30, seed=0)  # 50 windows: batch 1 holds 20 + 10
    first_tokens = torch.cat([batches.batch(step)[0][:, 0] for step in range(5)])
    assert first_tokens.bincount()[::8].tolist() == [3] * 50  # 150 rows are three epochs


def test_epochs_and_seeds_are_shuffled_differently(stream: TokenFile) -> None:
    orders = [
        [batches.window_of_row(row) for row in range(start, start + batches.num_windows)]
        for batches in (Batches(stream, sequence_length=1, batch_size=1, seed=seed) for seed in (0, 1))
        for start in (0, batches.num_windows)
    ]
    for i, order in enumerate(orders):
        for other in [range(len(order)), *orders[:i]]:
            # 402 windows: independent orders correlate with standard deviation 0.05.
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.2


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    num_tokens = 1 << 30
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(2 * num_tokens)  # a hole: no disk is used
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    (tmp_path / "huge.idx").write_bytes(header + struct.pack("<iqqq", num_tokens, 0, 0, 1))
    tokens = TokenFile(tmp_path / "huge")
    tracemalloc.start()
    try:
        batches = Batches(tokens, sequence_length=8, batch_size=16, seed=0)
        assert batches.batch(10**7)[0].shape == (16, 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_heldout_batches_are_the_first_windows_in_order(stream: TokenFile) -> None:
    def first_tokens(**ranks: int) -> list[list[int]]:
        batches = heldout_batches(stream, sequence_length=8, batch_size=4, num_batches=2, **ranks)
        return [batch.inputs_BS[:, 0].tolist() for batch in batches]

    assert first_tokens() == [[0, 8, 16, 24], [32, 40, 48, 56]]
    assert first_tokens(rank=0, num_ranks=2) == [[0, 8], [32, 40]]
    assert first_tokens(rank=1, num_ranks=2) == [[16, 24], [48, 56]]


@pytest.mark.parametrize(
    ("ids", "entropy"),
    [([1, 1, 1], 0.0), ([0, 0, 1, 1], math.log(2)), ([0, 0, 0, 9], math.log(4) - 0.75 * math.log(3))],
)
def test_unigram_entropy_by_hand(tmp_path: Path, ids: list[int], entropy: float) -> None:
    write_token_file(tmp_path / "t", documents(ids), vocab_size=10)
    assert unigram_entropy(TokenFile(tmp_path / "t"), 10) == pytest.approx(entropy, abs=1e-12)


def test_batch_that_the_ranks_cannot_share_is_refused(stream: TokenFile) -> None:
    batches = Batches(stream, sequence_length=8, batch_size=6, seed=0)
    with pytest.raises(UserError, match=r"batch size \(6\) must be a multiple of the number of data ranks \(4\)"):
        batches.batch(0, rank=0, num_ranks=4)
    with pytest.raises(UserError, match=r"batch size \(6\).*data ranks \(4\)"):
        heldout_batches(stream, sequence_length=8, batch_size=6, num_batches=1, num_ranks=4)


def test_too_little_text_is_refused(stream: TokenFile) -> None:
    with pytest.raises(UserError, match="gives 50 windows of 8 tokens, but 51 are asked for"):
        Batches(stream, sequence_length=8, batch_size=51, seed=0)
    with pytest.raises(UserError, match="gives 0 windows of 1000 tokens, but 1 are asked for"):
        Batches(stream, sequence_length=1000, batch_size=1, seed=0)
    with pytest.raises(UserError, match="gives 50 windows of 8 tokens, but 60 are asked for"):
        heldout_batches(stream, sequence_length=8, batch_size=20, num_batches=3)


@pytest.mark.parametrize(("ids", "bad", "at"), [([3, 10, 11], 10, 1), ([3, 3, -1], -1, 2)])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path, ids: list[int], bad: int, at: int) -> None:
    with pytest.raises(UserError, match=rf"document 1 for .* holds id {bad} at position {at}, outside \[0, 10\)"):
        write_token_file(tmp_path / "t", documents([0], ids), vocab_size=10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("empty", [[], documents([], [])])
def test_no_token_is_refused(tmp_path: Path, empty: list[NDArray[np.int64]]) -> None:
    with pytest.raises(UserError, match="would hold 0 tokens; give at least one readable text"):
        write_token_file(tmp_path / "t", empty, vocab_size=10)
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_smaller_vocabulary_is_refused(pair: Path) -> None:
    tokens = TokenFile(pair)
    assert tokens.count_ids(8).sum() == tokens.num_tokens
    for use in (lambda: unigram_entropy(tokens, 7), lambda: TokenFile(pair, vocab_size=7).read(0, tokens.num_tokens)):
        with pytest.raises(UserError, match=r"pair.bin holds id 7 at position 3, outside \[0, 7\).*tokenizer"):
            use()


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def overwrite(path: Path, at: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", Path.unlink, r"pair\.bin does not exist; give the name that a \.bin and an \.idx share"),
        (".idx", Path.unlink, r"pair\.idx does not exist"),
        (".bin", lambda path: cut(path, 8), r"pair\.bin has 8 bytes, but its \.idx describes 10"),
        (".bin", lambda path: path.write_bytes(bytes(12)), r"pair\.bin has 12 bytes, but its \.idx describes 10"),
        (".bin", lambda path: cut(path, 0), r"pair\.bin is empty \(2 documents in its \.idx\)"),
        (".idx", lambda path: cut(path, 0), r"pair\.idx is cut short: 0 bytes"),
        (".idx", lambda path: cut(path, 33), r"pair\.idx is cut short: 33 bytes"),
        (".idx", lambda path: cut(path, 80), r"pair\.idx is cut short: 80 bytes of 82"),
        (".idx", lambda path: overwrite(path, 0, 0), r"pair\.idx is no Megatron index of integers"),
        (".idx", lambda path: overwrite(path, 9, 2), r"no Megatron index of integers .*version 2"),
        (".idx", lambda path: overwrite(path, 17, 7), r"no Megatron index of integers .*dtype code 7"),
    ],
)
def test_damaged_pair_is_refused(pair: Path, suffix: str, damage: Callable[[Path], object], message: str) -> None:
    damage(pair.with_suffix(suffix))
    with pytest.raises(UserError, match=message):
        TokenFile(pair)
