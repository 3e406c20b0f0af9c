"""Stopping: why a run should end before its last step, as far as this rank knows.

A signal or a clock reaches ranks at different moments. Each step's sums carry what ranks want, so all end after the
same one, save, and leave with status 0.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

# Of which ranks add up theirs: any signal is more than the clocks of all.
SIGNAL, TIME, NOBODY = float(1 << 20), 1.0, 0.0


class Stopping:
    """While the block runs, SIGTERM is noted instead of ending the process.

    Args:
        time_limit_s: seconds from now; None: no limit.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        self._until = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signalled = False
        self._before: Any = None
        self.reason: str | None = None  # of all ranks, once they have agreed

    def wanted(self) -> float:
        """What this rank would have: SIGNAL, TIME or NOBODY."""
        if self._signalled:
            return SIGNAL
        return TIME if self._until is not None and time.monotonic() >= self._until else NOBODY

    def agree(self, total: float) -> None:
        """Note what all ranks wanted, added up."""
        if self.reason is None and total > NOBODY:
            self.reason = "SIGTERM" if total >= SIGNAL else "train.time_limit_s"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot take signals
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
