"""A folder in the making that outlives an interruption: what is finished of it stays, and the next run goes on there.

    .NAME.unfinished/about.json    what is made, by which a later run knows that it is the same
    .NAME.unfinished/done.json     the files that are whole, and what is known of each

Only an interruption leaves it (a signal, a loss of power); after an error it is deleted. It is hidden and lacks its
manifest, so nothing takes it for the whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ep_engine.errors import UserError
from ep_engine.output import check_output_folder, finish_folder, reported_disk_errors, sync, whole_file

_ABOUT, _DONE = "about.json", "done.json"


class Draft:
    """A folder that is being made.

    Attributes:
        folder: to write into.
        done: by name, what was noted of every file that is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Any] = {}
        self._syncs = ThreadPoolExecutor(1)
        self._on_disk: list[Future[None]] = []
        if (folder / _DONE).is_file():
            self.done = json.loads((folder / _DONE).read_text())

    def note(self, name: str, known: Any) -> None:
        """Note that a file is whole, as soon as the disk has it; meanwhile others can be written."""
        self._on_disk.append(self._syncs.submit(self._sync, name, known, dict(self.done)))
        self.done[name] = known

    def wait(self) -> None:
        """Until the disk has all that was noted; raises what it said."""
        for one in self._on_disk:
            one.result()
        self._on_disk.clear()

    def close(self) -> None:
        """Begin nothing more."""
        self._syncs.shutdown()

    def _sync(self, name: str, known: Any, before: dict[str, Any]) -> None:
        sync(self.folder / name)
        with whole_file(self.folder / _DONE) as beside:
            beside.write_text(json.dumps({**before, name: known}))


@contextmanager
def drafted(path: Path, about: Mapping[str, Any], *, overwrite: bool = False, resume: bool = False) -> Iterator[Draft]:
    """Yield a folder beside `path` to write into; it takes the name `path` only if the block succeeds.

    Args:
        path: the folder to make.
        about: JSON values that a run has in common with the one that it may go on from.
        overwrite: replace `path` if it is a non-empty folder.
        resume: go on with what an interrupted run left, if it left something.

    Raises:
        UserError: `path` is a non-empty folder and `overwrite` is not set; another process makes the same folder; or
            what is there to go on from is of another command.
        Fault: the disk is full; whatever stood at `path` still stands there.
    """
    check_output_folder(path, overwrite=overwrite)
    beside = path.with_name(f".{path.name}.unfinished")
    with _held(beside, path):
        _begin(beside, path, json.loads(json.dumps(about)), resume=resume)
        try:
            draft = Draft(beside)
            with reported_disk_errors(path), closing(draft):
                yield draft
                draft.wait()
                for name in (_ABOUT, _DONE):
                    (beside / name).unlink(missing_ok=True)
                finish_folder(beside, path)
        except Exception:  # which a repetition would only meet again; an interruption is none
            shutil.rmtree(beside, ignore_errors=True)
            raise
        shutil.rmtree(beside, ignore_errors=True)  # what stood at `path`


@contextmanager
def _held(beside: Path, path: Path) -> Iterator[None]:
    """Make the folder if it is not there, and keep others out of it."""
    beside.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(beside, os.O_RDONLY)
    try:
        if not _is_ours(descriptor, beside):
            raise UserError(f"output {path} is being made by another process; wait, or choose another folder")
        yield
    finally:
        os.close(descriptor)


def _is_ours(descriptor: int, beside: Path) -> bool:
    """Whether the lock could be taken, and of the folder that has the name now: another may just have finished."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), beside.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _begin(beside: Path, path: Path, about: dict[str, Any], *, resume: bool) -> None:
    if resume and (beside / _ABOUT).is_file():
        found = json.loads((beside / _ABOUT).read_text())
        for name in sorted(about.keys() | found.keys()):
            if about.get(name) != found.get(name):
                raise UserError(
                    f"--resume goes on with another {name} ({found.get(name)}) than this command has "
                    f"({about.get(name)}) for {path}; repeat that command, or leave out --resume to begin anew"
                )
        return
    for left in beside.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (beside / _ABOUT).write_text(json.dumps(about))
