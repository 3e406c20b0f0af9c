"""Profiles, the lists made of them and the cost of placements: by hand, by property, and on published counts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import (
    Profile,
    collaboration_lists,
    read_profile,
)
from ep_engine.errors import UserError
from ep_engine.model_config import check_lists
from tests.counts import COUNTS, DATA, LOAD, many_counts, published


def test_lists_by_hand() -> None:
    # expert 1 worked as often with 2 as with 3: the lower id comes first; expert 3 never met 2, and stands itself last
    assert collaboration_lists(COUNTS[None]) == [[[1, 3, 2, 0], [0, 2, 3, 1], [1, 0, 3, 2], [0, 1, 2, 3]]]


def test_experts_that_met_nobody_list_all_by_id() -> None:
    assert collaboration_lists(np.zeros((1, 3, 3), dtype=np.int64)) == [[[1, 2, 0], [0, 2, 1], [0, 1, 2]]]


@given(counts=many_counts(), diagonal=st.integers(-1, 9))
def test_lists_fall_in_count_then_rise_in_id_whatever_the_diagonal(counts: NDArray[np.int64], diagonal: int) -> None:
    num_experts = counts.shape[1]
    given_counts = counts + diagonal * np.eye(num_experts, dtype=np.int64)
    before = given_counts.copy()
    for layer, rows in enumerate(collaboration_lists(given_counts)):
        check_lists(rows, num_experts, where="test")
        for i, row in enumerate(rows):
            others = [(-int(counts[layer, i, j]), j) for j in row[:-1]]
            assert others == sorted(others)
    assert (given_counts == before).all()


def test_saved_profile_comes_back(tmp_path: Path) -> None:
    saved = Profile(COUNTS[None], LOAD[None], 2, {"tokens": 15, "seed": 3, "model_hash": "abc"})
    saved.save(tmp_path / "deep" / "profile.npz")
    back = read_profile(tmp_path / "deep" / "profile.npz")
    assert np.array_equal(back.counts, saved.counts)
    assert np.array_equal(back.load, saved.load)
    assert (back.top_k, back.about, back.num_layers, back.num_experts) == (2, saved.about, 1, 4)
    assert back.counts.dtype == back.load.dtype == np.int64
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["profile.npz"]


@pytest.mark.parametrize("name", ["profile", "profile.v2", "profile.npz"])
def test_profile_has_the_very_name_it_is_given(name: str, tmp_path: Path) -> None:
    Profile(COUNTS[None], LOAD[None], 2, {}).save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert np.array_equal(read_profile(tmp_path / name).counts[0], COUNTS)


@pytest.mark.parametrize("diagonal", [-1, 0, 7])
def test_published_diagonals_are_read_as_0(diagonal: int, tmp_path: Path) -> None:
    counts = COUNTS.astype(np.int32) + diagonal * np.eye(4, dtype=np.int32)
    np.savez(tmp_path / "profile.npz", counts=counts[None], load=LOAD[None].astype(np.int32), top_k=np.int64(2))
    back = read_profile(tmp_path / "profile.npz")
    assert np.array_equal(back.counts[0], COUNTS)
    assert back.counts.dtype == back.load.dtype == np.int64


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no counts": ({"counts": None}, "has no array counts; make it with `ep-engine profile`"),
    "no load": ({"load": None}, "has no array load"),
    "no top_k": ({"top_k": None}, "has no array top_k"),
    "one layer, no layers": (
        {"counts": COUNTS},
        r"has counts \(4, 4\) and load \(1, 4\), expected \(L, E, E\) and \(L, E\); make it again",
    ),
    "not square": ({"counts": COUNTS[None, :3]}, r"has counts \(1, 3, 4\) and load \(1, 4\)"),
    "load of other experts": ({"load": LOAD[None, :3]}, r"has counts \(1, 4, 4\) and load \(1, 3\)"),
    "not symmetric": (
        {"counts": COUNTS[None] + np.eye(4, k=1, dtype=np.int64)},
        "must be symmetric and not negative; make them again",
    ),
    "negative": ({"counts": -COUNTS[None]}, "must be symmetric and not negative"),
    "objects": ({"counts": np.array([[[{}]]], dtype=object)}, "cannot be read .*; make one with `ep-engine profile`"),
    "no layer": ({"counts": COUNTS[None][:0], "load": LOAD[None][:0]}, r"got int64 \(0, 4, 4\)"),
    "no expert": ({"counts": COUNTS[None, :0, :0], "load": LOAD[None, :0]}, r"got int64 \(1, 0, 0\)"),
    "top_k in a list": ({"top_k": np.array([2])}, "top_k"),
    "several top_k": ({"top_k": np.array([2, 2])}, "top_k"),
    "words": ({"counts": np.full((1, 4, 4), "many")}, "counts"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_profile_with_wrong_arrays_is_refused(name: str, tmp_path: Path) -> None:
    change, sentence = REFUSALS[name]
    path = tmp_path / "profile.npz"
    arrays = {"counts": COUNTS[None], "load": LOAD[None], "top_k": 2} | change
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=rf"{path} .*{sentence}"):
        read_profile(path)


def test_text_is_no_profile_and_nobody_is_told_to_trust_it(tmp_path: Path) -> None:
    (tmp_path / "profile.npz").write_text("some words")
    with pytest.raises(UserError, match=r"cannot be read \(it is no .npz of numbers\); make one with"):
        read_profile(tmp_path / "profile.npz")


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 150] ^= 0xFF
    path.write_bytes(data)


def _one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, COUNTS[None])


FILES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("counts"),
    "cut short": _cut_short,
    "a flipped byte": _flip_a_byte,
    "one array": _one_array,
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_profile_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    np.savez(path, counts=COUNTS[None], load=LOAD[None], top_k=2)
    FILES[name](path)
    with pytest.raises(UserError, match=rf"^profile {path} .*; make (one|it) (again|with `ep-engine profile`)$"):
        read_profile(path)


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    saved = Profile(COUNTS[None], LOAD[None], 2, {"seed": 3})
    saved.save(path)
    whole = path.read_bytes()
    num_refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            back = read_profile(path)
        except UserError:
            num_refused += 1
        else:
            assert np.array_equal(back.counts, saved.counts), position
            assert np.array_equal(back.load, saved.load), position
    assert num_refused > len(whole) / 3


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_is_refused_and_never_run(inside: bool, tmp_path: Path) -> None:
    path, touched = tmp_path / "profile.npz", tmp_path / "touched"
    if inside:
        bomb = np.empty((1, 1, 1), dtype=object)
        bomb[0, 0, 0] = _Bomb(touched)
        np.savez(path, counts=bomb, load=LOAD[None], top_k=2)
    else:
        path.write_bytes(pickle.dumps(_Bomb(touched)))
    with pytest.raises(UserError, match=r"profile .* cannot be read .*; make one with `ep-engine profile`"):
        read_profile(path)
    assert not touched.exists()


@published
def test_published_counts_give_the_lists_that_the_specification_names() -> None:
    base = np.load(DATA / "llama_moe_collaboration.npz")["base"]
    shipped = np.load(DATA / "llama_collaborative_list.npz")["collaborative_list"]
    lists = np.array(collaboration_lists(base))
    # the shipped lists came from another draw of texts: specs/c2r.md 5.1
    assert (lists == shipped).all(axis=2).sum() == 194
    assert (np.sort(lists, axis=2) == np.arange(8)).all()
    assert (lists[:, :, -1] == np.arange(8)).all()
