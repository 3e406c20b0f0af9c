"""Progress on stderr, so that stdout holds only the report; nothing is shown where stderr is no terminal."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar while they are gone through."""
    console = Console(stderr=True)
    return rich_track(items, description=what, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def bar(what: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield `advance(num_done)`; the bar, if it is shown, stands while the block runs."""
    with _shown(what, total, show, MofNCompleteColumn(), TimeElapsedColumn()) as advance:
        yield advance


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same for bytes, with the time that is left."""
    with _shown(what, total, True, DownloadColumn(), TimeRemainingColumn()) as advance:
        yield advance


@contextmanager
def token_bar(what: str, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(bytes_done, tokens_done)`, with bytes that are read and tokens per second."""
    began = time.perf_counter()
    columns = (DownloadColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with _shown(what, total_bytes, True, *columns, speed="") as advance:
        yield lambda num_bytes, num_tokens: advance(
            num_bytes, speed=f"{num_tokens / (time.perf_counter() - began):,.0f} tokens/s"
        )


@contextmanager
def _shown(what: str, total: int, show: bool, *columns: ProgressColumn, **fields: Any) -> Iterator[Callable[..., None]]:
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*shown, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total, **fields)
        yield lambda num_done, **new: progress.update(task, completed=num_done, **new)
