"""Progress on stderr, so that stdout holds only the report; nothing is shown where stderr is no terminal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar while they are gone through."""
    console = Console(stderr=True)
    return rich_track(items, description=what, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def bar(what: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield `advance(num_done)`; the bar, if it is shown, stands while the block runs."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda num_done: progress.update(task, completed=num_done)
