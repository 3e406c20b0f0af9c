"""Which parts of an arena are in use."""

from collections import deque

_ALIGNMENT = 4096


class Regions:
    """The bytes [first, end) of an arena. Parts come back from any thread, at any time."""

    def __init__(self, first: int, end: int) -> None:
        self._free = [(first, end)]  # ascending, none touching
        self._used: dict[int, int] = {}
        self._coming_back: deque[int] = deque()

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin that nobody uses; None if there is no such place."""
        self._collect()
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        if size == 0:
            return self._free[0][0] if self._free else 0
        for i, (first, end) in enumerate(self._free):
            if end - first >= size:
                self._free[i : i + 1] = [(first + size, end)] if end - first > size else []
                self._used[first] = size
                return first
        return None

    def give_back(self, first: int) -> None:
        """Done with what begins at `first`. Only notes it down: a collector may call this in the midst of `take`."""
        self._coming_back.append(first)

    def _collect(self) -> None:
        while self._coming_back:
            first = self._coming_back.popleft()
            self._free.append((first, first + self._used.pop(first)))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for first, end in self._free:
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((first, end))
        self._free = merged
