"""The stages of a pipeline: which layers each holds, and which rank holds it.

gpipe        all forwards, then all backwards, arXiv:1811.06965
1f1b         one forward, one backward, arXiv:2006.09503
interleaved  the same with several stages on a rank, arXiv:2104.04473
zbv          two stages on a rank in the shape of a V; gradients of weights in otherwise idle time, arXiv:2401.10241
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv"]


@dataclass(frozen=True)
class Stages:
    """Layers and rank of every stage, in the order of the layers."""

    layers: tuple[range, ...]
    rank_of_stage: tuple[int, ...]

    @classmethod
    def of(cls, num_layers: int, size: int, schedule: Schedule, lengths: Sequence[int] | None = None) -> "Stages":
        """Stages on `size` ranks.

        Args:
            num_layers: of the model, at least one for every stage.
            size: ranks of the pipeline.
            schedule: how they work together.
            lengths: layers of every stage, which add up; None: as even as can be, the first ones longer, because the
                last one has the head.
        """
        num_stages = len(lengths) if lengths else size * (2 if schedule in ("interleaved", "zbv") else 1)
        if lengths is None:
            lengths = [num_layers // num_stages + (i < num_layers % num_stages) for i in range(num_stages)]
        layers = tuple(range(*ends) for ends in pairwise(accumulate(lengths, initial=0)))
        there_and_back = [*range(size), *reversed(range(size))]
        ranks = there_and_back if schedule == "zbv" else [stage % size for stage in range(num_stages)]
        return cls(layers, tuple(ranks))

    def on(self, rank: int) -> list[int]:
        """Numbers of the stages of a rank, ascending."""
        return [stage for stage, holder in enumerate(self.rank_of_stage) if holder == rank]

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.layers) - 1
