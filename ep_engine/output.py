"""Outputs appear whole or not at all: written beside their final place, brought to the disk, then renamed."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep_engine.errors import NoRoom, UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


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
        NoRoom: the disk is full; whatever stood at `path` still stands there.
    """
    beside = begin_folder(path, overwrite=overwrite)
    try:
        with reported_disk_errors(path):
            yield beside
            finish_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def begin_folder(path: Path, *, overwrite: bool = False) -> Path:
    """An empty folder beside `path`; the caller gives it the name with `finish_folder`, and removes what is left."""
    check_output_folder(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed and had the same number
    beside.mkdir()
    return beside


def finish_folder(beside: Path, path: Path) -> None:
    """Let `beside` take the name `path`, once the disk has all of it. What stood at `path` is then at `beside`."""
    for folder, _, names in os.walk(beside, topdown=False):
        for name in (*names, ""):
            sync(Path(folder, name))
    if path.is_dir() and any(path.iterdir()):  # rename(2) replaces only an empty folder
        _exchange(beside, path)
    else:
        os.rename(beside, path)
    sync(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file name beside `path`; the file takes the name `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays the same: writers such as numpy and matplotlib look at it.
    beside = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        with reported_disk_errors(path):
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, which loses its name first: half of it never passes for the whole."""
    going = _beside(path)
    os.rename(path, going)
    shutil.rmtree(going)


def remove_leftovers(folder: Path) -> None:
    """Delete what dead processes began in `folder` and did not finish; only where no live one writes."""
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def reported_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk (or a file-size or quota limit) into `NoRoom`, which names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoom(f"no room to write {path} ({error.strerror}); free space and run again") from error
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Swap the names of two folders in one step, so that there is never none of that name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(b))
    # A file system that cannot: killed between these, a process leaves both folders, and neither under the name.
    aside = b.with_name(f".{b.name}.replaced-{os.getpid()}")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(aside, b)
        raise
    os.rename(aside, a)
