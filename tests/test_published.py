"""Published pickles and lists: read where they are what they should be, refused without running anything elsewhere."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.c2r.collaboration import collaboration_lists
from ep_engine.c2r.plain_pickle import plain_pickle
from ep_engine.c2r.published import read_lists, read_published_counts
from ep_engine.errors import UserError
from tests.counts import COUNTS, DATA, LOAD, published


def written(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("diagonal", [-1, 0])
def test_counts_and_the_load_that_is_in_them(protocol: int, diagonal: int, tmp_path: Path) -> None:
    counts = (COUNTS + diagonal * np.eye(4, dtype=np.int64))[None]
    found = read_published_counts(written(tmp_path / "c.pkl", counts, protocol), 2)
    assert np.array_equal(found.counts, COUNTS[None])
    assert np.array_equal(found.load, LOAD[None])
    assert (found.top_k, found.about["tokens"]) == (2, 15)


def test_the_names_of_numpy_1_are_known(tmp_path: Path) -> None:
    data = pickle.dumps(COUNTS[None], 4)
    old = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert old != data
    head = old.find(b"\x95")  # the length of the frame, one byte less
    length = int.from_bytes(old[head + 1 : head + 9], "little") - 1
    (tmp_path / "c.pkl").write_bytes(old[: head + 1] + length.to_bytes(8, "little") + old[head + 9 :])
    assert np.array_equal(read_published_counts(tmp_path / "c.pkl", 2).counts, COUNTS[None])


class Runs:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["alone", "in a list", "in an array", "as lists"])
def test_nothing_is_run(kind: str, tmp_path: Path) -> None:
    trap = Runs(tmp_path / "trap")
    value = {"alone": trap, "in a list": [trap], "as lists": [[[trap]]]}.get(kind)
    if kind == "in an array":
        value = np.array([trap], dtype=object)
    path = written(tmp_path / "c.pkl", value)
    for read in (lambda: read_published_counts(path, 2), lambda: read_lists(path)):
        with pytest.raises(UserError, match=r"wants to run .*, lists and numpy's arrays alone|'O8' holds no numbers"):
            read()
    assert not (tmp_path / "trap").exists()


@given(data=st.binary(max_size=200))
def test_noise_is_refused_in_a_sentence(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("noise") / "c.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_published_counts(path, 2)


@pytest.mark.parametrize("protocol", [2, 4])
def test_damage_of_any_bit_is_refused_or_seen_to_be_harmless(protocol: int, tmp_path: Path) -> None:
    """numpy's own parts end the process on some of these: the dtype m8 with the state of i8."""
    whole, path = pickle.dumps([COUNTS[None], np.int32(3)], protocol), tmp_path / "c.pkl"
    damaged = [whole[:cut] for cut in range(len(whole))]
    for place in range(len(whole)):
        for bit in range(8):
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    for data in damaged:
        try:
            found = plain_pickle(data, path)
        except UserError:
            continue
        assert found is None or isinstance(found, (list, tuple, np.ndarray, np.generic, int, float, str, bytes))


def test_a_pickle_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it wants to remember 2147483647 things"):
        plain_pickle(b"\x80\x02]r\xff\xff\xff\x7f.", tmp_path / "c.pkl")


def test_arrays_are_those_that_were_pickled(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        for array in (
            COUNTS,
            COUNTS.T,
            np.asfortranarray(COUNTS[:2]),
            COUNTS.astype(">i4"),
            np.float16([1.5, 2]),
            np.array(7),
        ):
            found = plain_pickle(pickle.dumps([array, (array,)], protocol), tmp_path)
            assert np.array_equal(found[0], array)
            assert np.array_equal(found[1][0], array)


REFUSED = {
    "a list": ([1, 2], 2, "holds list, not one array"),
    "not square": (np.zeros((1, 3, 4), dtype=np.int64), 2, r"must be integers \(L, E, E\), got int64 \(1, 3, 4\)"),
    "floats": (COUNTS[None] * 1.5, 2, "must be integers"),
    "asymmetric": (np.triu(COUNTS)[None], 2, "must be symmetric and not negative"),
    "negative": (-COUNTS[None], 2, "must be symmetric and not negative"),
    "an empty layer": (np.stack([COUNTS, 0 * COUNTS]), 2, "have no pair in layer 1, though tokens have 2 experts"),
    "no top_k": (COUNTS[None], None, r"--top-k \(None\) must be the model's number of experts per token"),
    "one expert": (COUNTS[None], 1, r"--top-k \(1\) must be"),
    "another top_k": (COUNTS[None], 3, r"rows of layer 0 in .* do not add up to multiples of 2"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_counts_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    value, top_k, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        read_published_counts(written(tmp_path / "c.pkl", value), top_k)


def test_lists_of_a_configuration_and_of_a_pickle(tmp_path: Path) -> None:
    lists = collaboration_lists(COUNTS[None])
    (tmp_path / "config.json").write_text(json.dumps({"top_t": 2, "collaborative_list": lists, "more": "keys"}))
    assert read_lists(tmp_path / "config.json") == (lists, 2)
    assert read_lists(written(tmp_path / "list.pkl", lists)) == (lists, None)
    assert read_lists(written(tmp_path / "arrays.pkl", [np.array(rows) for rows in lists])) == (lists, None)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "{",
        '{"collaborative_list": [[[1, 0], [0]]]}',
        '{"collaborative_list": [[0, 1]]}',
        '{"collaborative_list": [[[1.5, 0], [0, 1]]]}',
        '{"collaborative_list": [[["a", "b"], ["a", "b"]]]}',
        '{"collaborative_list": [[[1, 0], [0, 1]]], "top_t": "2"}',
        '{"collaborative_list": [[[1, 0], [0, 1]]], "top_t": true}',
    ],
)
def test_lists_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_lists(tmp_path / "config.json")


@published
@pytest.mark.parametrize(("name", "top_t"), [("llama", 5), ("qwen", 30)])
def test_published_lists_are_read(name: str, top_t: int, tmp_path: Path) -> None:
    stored = np.load(DATA / f"{name}_collaborative_list.npz")
    lists = stored["collaborative_list"].tolist()
    (tmp_path / "config.json").write_text(json.dumps({"top_t": int(stored["top_t"]), "collaborative_list": lists}))
    assert read_lists(tmp_path / "config.json") == (lists, top_t)


@published
def test_published_counts_are_read_from_a_pickle_as_they_were_published(tmp_path: Path) -> None:
    counts = np.load(DATA / "llama_moe_collaboration.npz")["base"]
    found = read_published_counts(written(tmp_path / "topt_5_collaboration.pkl", counts), 2)
    assert found.about["tokens"] == 204_800
    assert np.array_equal(found.load.sum(axis=1), np.full(32, 409_600))


def test_a_pickle_is_never_read_by_name(tmp_path: Path) -> None:
    """What is not in the list is not even imported."""
    stream = io.BytesIO()
    stream.write(b"cno_such_module_at_all\nthing\n.")
    (tmp_path / "c.pkl").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"wants to run no_such_module_at_all\.thing"):
        read_published_counts(tmp_path / "c.pkl", 2)
