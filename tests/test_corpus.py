"""Source files to token files: what is read, which side it falls on, and that no text is lost on the way."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ep_engine.data.corpus import (
    END_OF_TEXT,
    STANDARD_LIBRARY,
    Encoded,
    encode_files,
    read_source,
    split_by_file,
    standard_library_files,
    train_tokenizer,
)
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError

TEXTS = ["def area(width, height):\n    return width * height\n" * 3, "for width in area:\n    print(width)\n"] * 4


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "tokenizer"
    assert train_tokenizer(TEXTS, 290, folder) == 290
    return folder


def test_standard_library_has_no_tests_and_no_installed_packages() -> None:
    files = [path.relative_to(STANDARD_LIBRARY).as_posix() for path in standard_library_files()]
    assert {"os.py", "json/decoder.py", "unittest/mock.py"} <= set(files)
    assert not [name for name in files if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert standard_library_files() == sorted(standard_library_files())


@given(
    names=st.sets(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?\.py", fullmatch=True), min_size=40, max_size=60),
    seed=st.integers(-5, 5),
)
@settings(deadline=None, max_examples=25)
def test_the_side_of_a_file_depends_on_its_relative_path_alone(names: set[str], seed: int) -> None:
    here, there = Path("/here"), Path("/there/lib")
    train, heldout = split_by_file([here / name for name in sorted(names)], 0.5, seed, root=here)
    assert sorted(train + heldout) == sorted(here / name for name in names)

    # Elsewhere, backwards, and without one file of each side: nobody changes place.
    left = [name for name in sorted(names, reverse=True) if here / name not in (train[0], heldout[0])]
    again = split_by_file([there / name for name in left], 0.5, seed, root=there)
    assert [path.relative_to(there) for path in again[0]] == [path.relative_to(here) for path in train[1:]]
    assert [path.relative_to(there) for path in again[1]] == [path.relative_to(here) for path in heldout[1:]]


def test_split_takes_about_the_asked_share_and_follows_the_seed() -> None:
    files = [STANDARD_LIBRARY / f"{i}.py" for i in range(1000)]
    train, heldout = split_by_file(files, 0.1, seed=0)
    assert 70 <= len(heldout) <= 130  # binomial, three standard deviations
    assert set(heldout) != set(split_by_file(files, 0.1, seed=1)[1])
    assert len(train) == 1000 - len(heldout)


def test_a_side_without_files_is_refused() -> None:
    files = [STANDARD_LIBRARY / f"{i}.py" for i in range(5)]
    with pytest.raises(UserError, match=r"held-out fraction 1e-09 of 5 files leaves 5 for training and 0 held out"):
        split_by_file(files, 1e-9, seed=0)
    with pytest.raises(UserError, match="of 0 files leaves 0 for training"):
        split_by_file([], 0.5, seed=0)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("x = 'é'\n".encode(), "x = 'é'\n"),
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "# -*- coding: latin-1 -*-\nx = 'é'\n"),
        (b"\xef\xbb\xbfx = 1\r\n", "x = 1\n"),
        (b"", ""),
        (b"x = '\xe9'\n", None),
        (b"\n\n\n" + b"x = 1\n" * 2000 + b"\xe9", None),  # bad only beyond the lines that detection reads
        (b"# coding: klingon\n", None),
        (b"# coding: rot13\n", None),
    ],
)
def test_source_is_read_in_its_declared_coding(tmp_path: Path, data: bytes, text: str | None) -> None:
    (tmp_path / "source.py").write_bytes(data)
    assert read_source(tmp_path / "source.py") == text


@settings(deadline=None, max_examples=60)
@given(text=st.text() | st.text(alphabet=" \t\r\n'sdl.,0é\u200b\U0001f600") | st.just(f"a {END_OF_TEXT} b"))
def test_any_text_decodes_to_itself(tokenizer_folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_directory_is_hugging_faces(tokenizer_folder: Path) -> None:
    assert sorted(path.name for path in tokenizer_folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (290, END_OF_TEXT, 0)
    assert len(tokenizer.encode(" width")) == 1  # it did learn from the texts
    # transformers 4 knows this class, and would tidy spaces on decoding if it were not told.
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False


def test_equal_texts_give_equal_tokenizers(tokenizer_folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    train_tokenizer(iter(TEXTS), 290, tmp_path / "again", calls.append)
    for path in tokenizer_folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert calls == list(range(1, len(TEXTS) + 1))


def test_tokenizer_says_when_the_texts_run_out(tmp_path: Path) -> None:
    assert train_tokenizer(["abab"], 1000, tmp_path / "small") == 257 + 2  # ab, abab


def test_tokenizer_refusals(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size \(256\) must be at least 257"):
        train_tokenizer(TEXTS, 256, tmp_path / "new")
    with pytest.raises(UserError, match="is not empty"):
        train_tokenizer(TEXTS, 290, tokenizer_folder)


def test_a_file_becomes_a_document_that_ends_once(tokenizer_folder: Path, tmp_path: Path) -> None:
    # The second is empty; the third spells the end-of-text token, which must not end it.
    texts = [TEXTS[0], "", f"stop = '{END_OF_TEXT}'\n"]
    files = [tmp_path / f"{i}.py" for i in range(3)]
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)

    encoded = encode_files(files, tokenizer_folder, tmp_path / "out")

    tokens = TokenFile(tmp_path / "out")
    ids = tokens.read(0, tokens.num_tokens).tolist()
    assert encoded == Encoded(num_tokens=len(ids), num_documents=3, skipped=())
    assert (tokens.num_documents, ids.count(0), ids[-1]) == (3, 3, 0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    assert tokenizer.decode(ids) == "".join(text + END_OF_TEXT for text in texts)
    assert (tmp_path / "out.bin").stat().st_size == 2 * len(ids)


def test_files_that_are_not_text_are_reported(tokenizer_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i:03}.py" for i in range(150)]
    for path in files:
        path.write_bytes(b"x = 1\n")
    bad = (files[3], files[140])
    for path in bad:
        path.write_bytes(b"\xff\xfe")
    calls: list[int] = []

    encoded = encode_files(files, tokenizer_folder, tmp_path / "out", calls.append)

    assert encoded.skipped == bad
    assert encoded.num_documents == 148
    assert calls == sorted(calls)
    assert calls[-1] == 150


def test_encoding_twice_gives_the_same_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    files = standard_library_files()[:20]
    for name in ("one", "two"):
        encode_files(files, tokenizer_folder, tmp_path / name)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_encoding_refusals(tokenizer_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source.py", tmp_path / "out"
    source.write_bytes(b"\xff")
    with pytest.raises(UserError, match="would hold 0 tokens"):
        encode_files([source], tokenizer_folder, out)
    with pytest.raises(UserError, match=r"nowhere holds none of tokenizer\.json"):
        encode_files([source], tmp_path / "nowhere", out)

    damaged = tmp_path / "damaged"
    shutil.copytree(tokenizer_folder, damaged)
    (damaged / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(UserError, match=r"damaged cannot be loaded \(.*\); write it again"):
        encode_files([source], damaged, out)

    endless = tmp_path / "endless"
    shutil.copytree(tokenizer_folder, endless)
    config = json.loads((endless / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="endless names no eos_token"):
        encode_files([source], endless, out)
    assert not list(tmp_path.glob("*out*"))
