"""A run folder has one writer at a time.

The first rank of a run holds a lock on FOLDER/run.lock, which the kernel lets go when the rank ends, however it ends;
so whoever has the lock may delete what dead processes left.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep_engine.errors import UserError
from ep_engine.output import remove_folder, remove_leftovers

LOCK = "run.lock"

_log = logging.getLogger(__name__)


def check_unused(folder: Path) -> None:
    """UserError if a live run writes into `folder`. Touches nothing."""
    if (folder / LOCK).is_file():
        with (folder / LOCK).open() as file:
            _lock(file.fileno(), fcntl.LOCK_SH, folder)  # shared: all ranks of a job may ask at once


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` if it is not there, keep other runs out of it, and delete what dead ones did not finish.

    Raises:
        UserError: a live run writes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        _lock(file.fileno(), fcntl.LOCK_EX, folder)
        for place in (folder, folder / "checkpoints"):
            remove_leftovers(place)
        yield


def empty(folder: Path) -> None:
    """Delete all that a run left in `folder`; its lock stays, for it is held."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        elif path.name != LOCK:
            path.unlink()


def _lock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"output.folder {folder} is being written by another run; choose another folder, or end that run first"
        ) from None
    except OSError as error:
        _log.warning("%s cannot be locked (%s): nothing keeps a second run out of it", folder, error.strerror)
