"""Outputs appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from ep_engine.errors import Fault, UserError
from ep_engine.output import check_output_file, check_output_folder, reported_disk_errors, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_is_done(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.json"
    with whole_file(target) as beside:
        assert (beside.parent, beside.suffix) == (target.parent, ".json")
        beside.write_text("new")
        assert not target.exists()
    assert (names(target.parent), target.read_text()) == (["out.json"], "new")


@pytest.mark.parametrize("stopped", [ValueError, KeyboardInterrupt])
def test_a_stop_leaves_the_old_file(stopped: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")

    def write() -> None:
        with whole_file(tmp_path / "out") as beside:
            beside.write_text("half")
            raise stopped

    with pytest.raises(stopped):
        write()
    assert (names(tmp_path), (tmp_path / "out").read_text()) == (["out"], "old")


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
def test_folder_appears_when_the_block_is_done(before: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if before != "nothing":
        target.mkdir(parents=True)
    if before == "full":
        (target / "old").touch()
    with whole_folder(target, overwrite=before == "full") as beside:
        (beside / "new").touch()
        assert not (target / "new").exists()
    assert (names(target.parent), names(target)) == (["out"], ["new"])


def test_a_stop_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def write() -> None:
        with whole_folder(tmp_path / "out", overwrite=True) as beside:
            (beside / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["old"])


def test_full_folder_is_refused_before_the_block(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    sentence = r"^output folder .*/out is not empty \(1 entries\); choose another or pass --overwrite$"
    with pytest.raises(UserError, match=sentence), whole_folder(tmp_path / "out"):
        pytest.fail("the block was entered")
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["old"])


def test_what_an_output_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "new", overwrite=False)
    check_output_folder(tmp_path / "empty", overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    check_output_file(tmp_path / "new", overwrite=False)
    check_output_file(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"^output .*/file is a file, expected a folder; choose another name$"):
        check_output_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"^output .*/empty is a folder, expected the name of a file; add one$"):
        check_output_file(tmp_path / "empty", overwrite=True)
    with pytest.raises(UserError, match=r"^output .*/file exists; choose another name or pass --overwrite$"):
        check_output_file(tmp_path / "file", overwrite=False)
    assert names(tmp_path) == ["empty", "file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_fault_that_names_the_output(number: int, tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "out") as beside:
            beside.touch()
            raise OSError(number, os.strerror(number))

    sentence = rf"^no room to write .*/out \({os.strerror(number)}\); free space and run again$"
    with pytest.raises(Fault, match=sentence):
        write()
    assert names(tmp_path) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), reported_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
