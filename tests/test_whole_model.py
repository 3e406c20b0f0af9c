"""Models written and read tensor by tensor: interrupted and gone on with, in a small memory, never half there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools import convert as converting
from checkpoint_tools.conversion import How
from checkpoint_tools.convert import convert
from checkpoint_tools.source import open_source
from ep_engine import whole_model
from ep_engine.deferred import Deferred, Tensors
from ep_engine.draft import drafted
from ep_engine.errors import Fault, UserError
from ep_engine.whole_model import in_files, made_ahead, read_model, write_model
from tests.small_models import assert_same_bits, dense_folder, edit_json, moe_checkpoint, run_tool


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


def test_several_files_hold_the_same_as_one(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(dense, tmp_path / "one")
    monkeypatch.setattr(whole_model, "FILE_BYTES", 20_000)
    convert(dense, tmp_path / "many")
    assert len(list((tmp_path / "one" / "weights").glob("*.distcp"))) == 1
    assert len(list((tmp_path / "many" / "weights").glob("*.distcp"))) > 3
    assert_same_bits(read_model(tmp_path / "one")[1], read_model(tmp_path / "many")[1])


def test_tensors_go_into_files_in_order() -> None:
    def of(size: int) -> Deferred:
        return Deferred((size,), torch.float32, lambda: torch.zeros(size))

    tensors = Tensors({"a": of(3), "b": of(3), "c": of(9), "d": of(1), "e": of(1)})
    assert in_files(tensors, 24) == [["a", "b"], ["c"], ["d", "e"]]
    assert in_files(tensors, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert [name for name, _ in made_ahead(tensors, ["d", "a"])] == ["d", "a"]
    assert list(made_ahead(tensors, [])) == []


class Interrupted(BaseException):
    """As a signal ends a process."""


def interrupted_after(conversion: Any, count: int, how: How) -> None:
    """Run a conversion that ends as its `count`-th tensor is asked for."""
    left = [count]

    def ending(name: str, deferred: Deferred) -> Deferred:
        def make() -> Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted
            return deferred.make()

        return Deferred(deferred.shape, deferred.dtype, make)

    deferred = conversion.source.tensors.deferred
    conversion.source.tensors.deferred = {name: ending(name, one) for name, one in deferred.items()}
    with pytest.raises(Interrupted):
        conversion.run(how)


def test_an_interrupted_conversion_goes_on_where_it_was(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model, "FILE_BYTES", 10_000)
    convert(dense, tmp_path / "whole")
    interrupted_after(converting.prepare(dense, tmp_path / "out"), 12, How())
    left = tmp_path / ".out.unfinished"
    files = sorted((left / "weights").glob("*.distcp"))
    done = json.loads((left / "done.json").read_text())
    assert 0 < len(done) < len(files) + 1
    assert not (tmp_path / "out").exists()
    stamps = {name: (left / name).stat().st_mtime_ns for name in done}
    converting.prepare(dense, tmp_path / "out").run(How(resume=True))
    assert not left.exists()
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == stamps  # not written again
    assert_same_bits(read_model(tmp_path / "whole")[1], read_model(tmp_path / "out")[1])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())


def test_what_is_left_of_another_command_is_refused_or_replaced(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(converting.prepare(dense, tmp_path / "out"), 5, How())
    other = dense_folder(tmp_path / "other", initializer_range=0.1)
    assert run_tool("convert", other, tmp_path / "out", "--resume") == 2
    assert "--resume goes on with another source" in capsys.readouterr().err
    assert (tmp_path / ".out.unfinished").is_dir()  # it is not this command's to delete
    assert run_tool("convert", other, tmp_path / "out") == 0
    assert not (tmp_path / ".out.unfinished").exists()
    assert run_tool("verify", other, tmp_path / "out") == 0


def test_a_source_that_has_changed_is_not_gone_on_with(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dense_folder(tmp_path / "source")
    interrupted_after(converting.prepare(source, tmp_path / "out"), 5, How())
    edit_json(source / "config.json", lambda c: c.update(mine=1))
    assert run_tool("convert", source, tmp_path / "out", "--resume") == 2
    assert "another state of the source" in capsys.readouterr().err


def test_two_cannot_make_one_folder(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with drafted(tmp_path / "out", {}):
        assert run_tool("convert", dense, tmp_path / "out") == 2
        assert "is being made by another process" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not empty"), drafted(tmp_path, {}):
        pass


def test_a_killed_conversion_leaves_nothing_that_looks_whole(dense: Path, tmp_path: Path) -> None:
    slow = (
        "import time\nfrom checkpoint_tools import conversion\nfrom checkpoint_tools.cli import app\n"
        "from ep_engine.command_line import exit_with_sentence\n"
        "write = conversion.write_into\n"
        "conversion.write_into = lambda *a, **k: (write(*a, **k), time.sleep(60))\n"
        "exit_with_sentence(app)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", slow, "convert", str(dense), str(out)])
    try:
        until = time.monotonic() + 60
        while not (tmp_path / ".out.unfinished" / "manifest.json").is_file():
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert run_tool("convert", dense, out, "--resume") == 0
    assert run_tool("verify", dense, out) == 0


def test_an_error_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    config, tensors = open_source(dense).config, dict(open_source(dense).tensors)
    broken = Tensors.of(tensors)
    broken.deferred = {**broken.deferred, "norm.weight": Deferred((32,), torch.float32, lambda: _fail())}
    with pytest.raises(Fault, match="of the disk"):
        write_model(tmp_path / "out", config, broken)
    assert list(tmp_path.iterdir()) == []
    del tensors["norm.weight"]
    with pytest.raises(UserError, match=r"tensor norm.weight is missing"):
        write_model(tmp_path / "out", config, tensors)
    with pytest.raises(UserError, match=r"norm.weight has shape \(3,\), model.json says \(32,\)"):
        write_model(tmp_path / "out", config, {**tensors, "norm.weight": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def _fail() -> Tensor:
    raise Fault("of the disk")


@pytest.mark.parametrize("tool", ["convert", "split", "upcycle", "export"])
def test_a_dry_run_says_what_is_needed_and_writes_nothing(
    tool: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sizes = dense, ["--num-experts", 4, "--top-k", 2] if tool in ("split", "upcycle") else []
    if tool == "export":
        source = moe_checkpoint(tmp_path / "moe", dense)
    before = sorted(tmp_path.rglob("*"))
    assert run_tool(tool, source, tmp_path / "out", *sizes, "--dry-run", "--json") == 0
    need = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    assert run_tool(tool, source, tmp_path / "out", *sizes, "--dry-run") == 0
    assert "would have 0.00 GiB" in capsys.readouterr().out
    assert run_tool(tool, source, tmp_path / "out", *sizes) == 0
    assert need["output_bytes"] == sum(one.num_bytes for one in open_source(tmp_path / "out").tensors.deferred.values())
    assert 0 < need["seconds"] < 60
    assert need["memory_bytes"] > 0


def test_manifests_say_where_a_model_came_from(dense: Path, tmp_path: Path) -> None:
    assert run_tool("convert", dense, tmp_path / "engine") == 0
    split = ("--num-experts", 4, "--top-k", 2)
    assert run_tool("split", tmp_path / "engine", tmp_path / "moe", *split) == 0
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    found = [
        json.loads((tmp_path / name).read_text())
        for name in ("engine/manifest.json", "moe/manifest.json", "hf/ep_engine_manifest.json")
    ]
    assert [one["tool"] for one in found] == ["convert", "split", "export"]
    assert found[0]["source_hash"] == found[1]["source_hash"] == open_source(dense).hash()
    assert found[2]["source_hash"] == open_source(tmp_path / "moe").hash() == open_source(tmp_path / "hf").hash()
    assert len(found[1]["split_hash"]) == 64
    assert all(one["version"] for one in found)
    assert len(found[2]["checksums"]) == len(open_source(tmp_path / "hf").tensors.deferred)
