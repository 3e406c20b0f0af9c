"""A full disk and damaged checkpoints: one sentence, status 1 or 2, and whatever stood before still stands."""

import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from checkpoint_tools.source import open_source
from tests.small_models import all_tensors, assert_same_bits, dense_folder, run_tool


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense")


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`: to a writer the same as a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_previous_checkpoint(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(dense, tmp_path / "engine")
    before = dict(open_source(tmp_path / "engine").tensors)
    other = dense_folder(tmp_path / "other", initializer_range=0.1)
    with full_disk(20_000):
        assert run_tool("convert", other, tmp_path / "engine", "--overwrite") == 2
    assert "no room to write" in capsys.readouterr().err
    assert_same_bits(before, dict(open_source(tmp_path / "engine").tensors))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "engine", "other"]


def test_a_full_disk_leaves_the_previous_export(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(dense, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "hf")
    with full_disk(20_000):
        assert run_tool("export", tmp_path / "engine", tmp_path / "hf", "--overwrite") == 2
    assert "no room to write" in capsys.readouterr().err
    assert_same_bits(all_tensors(dense), all_tensors(tmp_path / "hf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "engine", "hf"]


def _weights(folder: Path) -> Path:
    (path,) = (folder / "weights").glob("*.distcp")
    return path


def _flip(folder: Path) -> None:
    content = bytearray(_weights(folder).read_bytes())
    content[3000] ^= 1
    _weights(folder).write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a flipped bit": (_flip, 1, "the file is damaged, restore it"),
    "truncated": (lambda f: _weights(f).write_bytes(_weights(f).read_bytes()[:5000]), 1, "cannot be read"),
    "lost weights": (lambda f: _weights(f).unlink(), 1, "cannot be read"),
    "lost index": (lambda f: (f / "weights" / ".metadata").unlink(), 2, "holds no complete engine checkpoint"),
    "damaged index": (
        lambda f: (f / "weights" / ".metadata").write_bytes(b"x"),
        2,
        "holds no complete engine checkpoint",
    ),
    "lost manifest": (lambda f: (f / "manifest.json").unlink(), 2, "holds no complete engine checkpoint"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), 2, "has format version None"),
    "damaged model.json": (lambda f: (f / "model.json").write_text("{"), 2, "model.json"),
}


@pytest.mark.parametrize("name", ["manifest.json", "model.json", "weights/.metadata", "weights/__0_0.distcp"])
def test_a_file_cut_short_anywhere_is_never_read(
    name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(dense, tmp_path / "engine")
    file = tmp_path / "engine" / name
    whole = file.read_bytes()
    lengths = {0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)}
    for length in sorted(lengths):
        file.write_bytes(whole[:length])
        assert run_tool("export", tmp_path / "engine", tmp_path / "hf") in (1, 2), length
        message = capsys.readouterr().err
        assert str(tmp_path / "engine") in message
        assert message.count("\n") == 1
    file.write_bytes(whole)
    assert run_tool("export", tmp_path / "engine", tmp_path / "hf") == 0


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_never_read(
    name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, status, sentence = DAMAGE[name]
    convert(dense, tmp_path / "engine")
    damage(tmp_path / "engine")
    for command in (["inspect"], ["export", tmp_path / "hf"]):
        assert run_tool(command[0], tmp_path / "engine", *command[1:]) == status
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
    assert not (tmp_path / "hf").exists()
