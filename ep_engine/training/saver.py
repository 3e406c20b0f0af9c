"""Saves of a run, one at a time, written by a thread while training goes on.

What is to be written is copied before the next step changes it, into buffers that are kept from save to save: there is
at most one copy. A save that is due while the one before is still being written waits for it.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ep_engine import checkpoint
from ep_engine.entries import Shard
from ep_engine.model_config import ModelConfig

_log = logging.getLogger(__name__)


@dataclass
class Saver:
    """Writes the checkpoints of one run; every rank has one, and calls the same methods in the same order.

    As a context it gives what is being written the time to become whole, or to fail, when the run ends badly.
    """

    run_folder: Path
    model: ModelConfig
    source: Path | None  # whose tokenizer files are carried along
    group: dist.ProcessGroup  # of all ranks, and of no other use: collectives of two threads have no common order
    timeout_s: float
    keep: int | None = None  # checkpoints that stay; None: all
    background: bool = True
    last: Path | None = None  # the newest checkpoint that is complete
    blocked_s: float = 0.0  # how long training waited
    copies: dict[str, Shard] = field(default_factory=dict)
    _running: Future[None] | None = None
    _has_waited: bool = False

    def save(self, step: int, entries: Mapping[str, Shard], data: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; in the background, return once `entries` are copied. `data`: where the text is."""
        if self._running is not None and not self._running.done() and not self._has_waited:
            self._has_waited = True
            if dist.get_rank(self.group) == 0:
                _log.warning("the save at step %d waits for the one before: train.save_every is short", step)
        self.wait()
        with self._training_waits():
            if not self.background:
                self._write(step, entries, data)
                return
            self._copy(entries)
            self._running = Future()
            # A daemon: an interpreter that has to end does not wait for a peer that hangs.
            Thread(target=self._resolve, args=(self._running, step, data), daemon=True, name="save").start()

    def poll(self, group: dist.ProcessGroup) -> None:
        """Raise what went wrong in the background, on all ranks after the same step; `group` is for training."""
        if self._running is None:
            return
        done = torch.tensor(int(self._running.done()))
        dist.all_reduce(done, dist.ReduceOp.MIN, group=group)
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written, and raise what went wrong."""
        if self._running is None:
            return
        with self._training_waits():
            error = self._running.exception()
        self._running = None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            with suppress(Exception):  # why the run ends is what the user has to know
                self._running.result(self.timeout_s)

    def _resolve(self, running: Future[None], step: int, data: Mapping[str, Any] | None) -> None:
        try:
            self._write(step, self.copies, data)
        except BaseException as error:
            running.set_exception(error)
        else:
            running.set_result(None)

    def _write(self, step: int, entries: Mapping[str, Shard], data: Mapping[str, Any] | None) -> None:
        path = self.run_folder / "checkpoints" / f"step_{step:06}"
        training = {"step": step, "data": data}
        checkpoint.save(
            path, self.model, entries, training=training, source=self.source, group=self.group, overwrite=True
        )
        self.last = path
        if self.keep is not None and dist.get_rank(self.group) == 0:
            try:
                checkpoint.keep_newest(self.run_folder, self.keep)
            except OSError as error:  # no reason to end a run
                _log.warning("older checkpoints of %s could not be deleted (%s)", self.run_folder, error)

    def _copy(self, entries: Mapping[str, Shard]) -> None:
        if not self.copies:
            self.copies = {name: _copied(shard) for name, shard in entries.items()}
            return
        for name, shard in entries.items():
            self.copies[name].tensor.copy_(shard.tensor)

    @contextmanager
    def _training_waits(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - before


def _copied(shard: Shard) -> Shard:
    """The same part of the same entry, in host memory of its own."""
    saved = shard.saved.to("cpu", copy=True)
    return replace(shard, saved=saved, tensor=saved.to_local() if isinstance(saved, DTensor) else saved)
