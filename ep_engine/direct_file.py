"""A large file written past the page cache, from its beginning to its end.

A page of the cache is taken anew for every page written, which costs more than the disk where a machine is given its
memory as it touches it (benchmarks/RESULTS.md). Here bytes are gathered in two rooms, one of which the disk takes
while the other is filled; what does not fill a room at the end goes the usual way. It is kept after an fsync.
"""

import errno
import fcntl
import io
import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOM_BYTES = 1 << 24  # at a time, a multiple of any block of a disk

_log = logging.getLogger(__name__)


class DirectFile(io.BufferedIOBase):
    """Replaces the file at `path`. What the disk says comes from a later `write`, or from `close`."""

    def __init__(self, path: Path) -> None:
        self._folder, self._pool = path.parent, ThreadPoolExecutor(1)
        self._room, self._other = (_room() for _ in range(2))
        self._filled, self._size = 0, 0
        self._writing: Future[None] | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._past_cache(on=True)

    def writable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: Any, /) -> int:
        """All of `data`, bytes or what has a buffer of them; it may be changed afterwards."""
        given = np.asarray(memoryview(data).cast("B"))
        done = 0
        while done < len(given):
            count = min(len(given) - done, ROOM_BYTES - self._filled)
            self._room[self._filled : self._filled + count] = given[done : done + count]
            done, self._filled = done + count, self._filled + count
            if self._filled == ROOM_BYTES:
                self._wait()
                self._writing = self._pool.submit(self._store, self._room)
                self._room, self._other, self._filled = self._other, self._room, 0
        self._size += done
        return done

    def close(self) -> None:
        """Write what is left."""
        if self.closed:
            return
        try:
            self._wait()
            self._past_cache(on=False)
            self._store(self._room[: self._filled])
        finally:
            super().close()
            self._pool.shutdown()
            os.close(self._descriptor)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _store(self, part: NDArray[np.uint8]) -> None:
        while len(part):
            try:
                part = part[os.write(self._descriptor, part.data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                    raise
                self._past_cache(on=False)
                _say_once(self._folder)

    def _past_cache(self, *, on: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _say_once(self._folder)


def _room() -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, ROOM_BYTES), np.uint8)  # begins at a page


@cache
def _say_once(folder: Path) -> None:
    _log.info("the file system of %s has no direct writes: files go through the page cache", folder)
