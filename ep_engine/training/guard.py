"""Guard: steps that are no numbers, and losses that leap."""

import logging
import statistics
from collections import deque

from ep_engine.config import TrainSection

RECENT = 20  # steps whose mean a loss is compared with
GO_BACK = 3  # times that a run may

_log = logging.getLogger(__name__)


class Guard:
    """Of one run; all ranks see the same losses and decide alike."""

    def __init__(self, train: TrainSection) -> None:
        self._train = train
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._in_row = self._skipped = self._back = 0
        self._has_told = False

    def may_skip(self) -> bool:
        """A step's loss or gradient is no number: whether it may be left out; counts it."""
        self._in_row += 1
        self._skipped += 1
        return self._in_row <= self._train.skip_steps

    def counted(self) -> None:
        """A step was taken."""
        self._in_row = 0

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is far above those before, of which there must be enough; else it is one of them."""
        factor = self._train.spike_factor
        if factor is not None and len(self._recent) == RECENT and loss > factor * statistics.fmean(self._recent):
            return True
        self._recent.append(loss)
        return False

    def may_go_back(self) -> bool:
        """Whether a run may go back to its last checkpoint once more; counts it."""
        self._back += 1
        return self._back <= GO_BACK

    def tell_once(self, rank: int, sentence: str) -> None:
        """A warning of the first rank."""
        if rank == 0 and not self._has_told:
            _log.warning(sentence)
        self._has_told = True

    def told(self) -> dict[str, int]:
        """What happened since the run was started, if anything did."""
        found = {"skipped_steps": self._skipped, "went_back": self._back}
        return {name: count for name, count in found.items() if count}
