"""A progress bar on stderr, so that stdout holds only the report."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar while they are gone through; nothing is shown where stderr is no terminal."""
    console = Console(stderr=True)
    return rich_track(items, description=what, console=console, transient=True, disable=not console.is_terminal)
