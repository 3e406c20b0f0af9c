"""Documents of every kind of file, in blocks, and files that are none."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ep_engine.data import documents
from ep_engine.data.documents import blocks, document_files, domains, text_of, texts, value_of
from ep_engine.errors import UserError


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n\n{"text": "two"}')
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"content": "four", "text": "not this"}]')
    (tmp_path / "c.txt").write_text("five\nsix\n")
    parquet.write_table(pa.table({"id": [1, 2], "text": ["seven", "eight"]}), tmp_path / "d.parquet")
    malformed: list[str] = []
    files = document_files([tmp_path])
    assert list(texts(files, malformed)) == ["one", "two", "three", "four", "five\nsix\n", "seven", "eight"]
    assert list(texts(files[2:3], malformed, lines=True)) == ["five", "six"]
    assert malformed == []


def test_what_cannot_be_read_is_told_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n{"text": \n{"id": 3}\n\xff\n[1]\n{"text": null}\n{"text": "too"}\n')
    malformed: list[str] = []
    assert list(texts([file], malformed)) == ["good", "too"]
    assert [line.split(": ")[0] for line in malformed] == [f"{file}:{n}" for n in (2, 3, 4, 5, 6)]
    assert malformed[0].split(": ", 1)[1].startswith("no JSON (Expecting value")
    assert malformed[1].endswith("no text under content or text")
    assert malformed[2].endswith("no UTF-8 (invalid start byte)")


@given(lines=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), min_size=1))
def test_blocks_hold_every_line_once(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BYTES_PER_BLOCK", 64)
        found = list(blocks(file))
    assert [block.first for block in found] == [1 + sum(len(b.items) for b in found[:i]) for i in range(len(found))]
    assert sum(block.num_bytes for block in found) == file.stat().st_size
    assert [text_of(value_of(item, is_json=True)) for block in found for item in block.items] == lines


def test_parquet_comes_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_ROWS_PER_BLOCK", 3)
    rows = [{"instruction": f"q{i}", "output": f"a{i}", "text": f"t{i}"} for i in range(8)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(blocks(tmp_path / "a.parquet", records=True))
    assert [(block.first, len(block.items)) for block in found] == [(1, 3), (4, 3), (7, 2)]
    assert [row for block in found for row in block.items] == rows
    (first, *_) = blocks(tmp_path / "a.parquet")
    assert first.items == [{"text": f"t{i}"} for i in range(3)]


def test_every_folder_is_a_domain(tmp_path: Path) -> None:
    for name in ("en_cc", "github", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("x")
    assert domains(tmp_path) == {name: [tmp_path / name / "a.txt"] for name in ("en_cc", "github")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"corpus .*/empty holds 0 files that end in \.jsonl, \.json, \.parquet, \.txt"):
        domains(tmp_path)
    with pytest.raises(UserError, match=r"corpus .*/github holds 0 folders, and every domain is one"):
        domains(tmp_path / "github")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.json", b"{", r"a\.json is no JSON \("),
        ("a.json", b"{}", r"a\.json must be a JSON array of records, got dict"),
        ("a.parquet", b"PAR1 not", r"a\.parquet is no parquet file \("),
        ("a.csv", b"x", r"corpus .*a\.csv must end in \.jsonl, \.json, \.parquet, \.txt, got '\.csv'"),
    ],
)
def test_files_of_no_kind_are_refused(name: str, data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        list(texts(document_files([tmp_path / name]), []))


def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus .*/none does not exist"):
        document_files([tmp_path / "none"])
