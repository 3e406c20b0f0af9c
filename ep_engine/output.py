"""Outputs appear whole or not at all: written beside their final place, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep_engine.errors import Fault, UserError


def check_output_folder(path: Path, *, overwrite: bool) -> None:
    """UserError if `path` is a file, or a non-empty folder and `overwrite` is not set. Touches nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file, expected a folder; choose another name")
    _check_above(path)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(
            f"output folder {path} is not empty ({sum(1 for _ in path.iterdir())} entries); "
            "choose another or pass --overwrite"
        )
    here = Path.cwd()
    if path.is_dir() and path.resolve() in (here, *here.parents, Path.home()):
        raise UserError(f"output {path} would replace the folder you are in or your home; name a folder inside it")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """UserError if `path` exists and `overwrite` is not set, or is a folder. Touches nothing."""
    if path.is_dir():
        raise UserError(f"output {path} is a folder, expected the name of a file; add one")
    if path.exists() and not overwrite:
        raise UserError(f"output {path} exists; choose another name or pass --overwrite")
    _check_above(path)


def _check_above(path: Path) -> None:
    above = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"output {path} would lie below {above}, which is a file; choose another name")


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path` to write into; it takes the name `path` only if the block succeeds.

    Raises:
        UserError: `path` is a non-empty folder and `overwrite` is not set.
        Fault: the disk is full; whatever stood at `path` still stands there.
    """
    check_output_folder(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed and had the same number
    beside.mkdir()
    try:
        with reported_disk_errors(path):
            yield beside
            _replace_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file name beside `path`; the file takes the name `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays the same: writers such as numpy and matplotlib look at it.
    beside = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with reported_disk_errors(path):
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def reported_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk (or a file-size or quota limit) into a Fault that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Fault(f"no room to write {path} ({error.strerror}); free space and run again") from error
        raise


def _replace_folder(new: Path, path: Path) -> None:
    """rename(2) replaces only an empty folder, so an old one steps aside first and is put back on failure."""
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
