"""The stages of a pipeline: which layers each holds, which rank holds it, and in which order a rank works.

gpipe        all forwards, then all backwards, arXiv:1811.06965
1f1b         one forward, one backward, arXiv:2006.09503
interleaved  the same with several stages on a rank, arXiv:2104.04473
zbv          two stages on a rank in the shape of a V; gradients of weights in otherwise idle time, arXiv:2401.10241
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

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


class Action(NamedTuple):
    """A forward, a backward, or the halves of one: of the inputs, and of the weights."""

    kind: Literal["forward", "backward", "backward_input", "backward_weight"]
    stage: int
    part: int


def order_of_work(stages: Stages, size: int, rank: int, schedule: Schedule, num_parts: int) -> list[Action]:
    """What a rank of a pipeline of `size` ranks does in a step, as torch's schedules do it.

    torch's own lists cannot be had without process groups; tests/test_order_of_work.py compares.
    """
    if size == 1:
        return [Action(kind, 0, part) for part in range(num_parts) for kind in ("forward", "backward")]
    if schedule == "zbv":
        return _zbv(stages.on(rank), size, rank, num_parts)
    here = stages.on(rank)
    count = len(here) * num_parts
    per_round = num_parts // max(1, num_parts // size)  # parts that go through a stage before the next one's turn
    in_flight = {
        "gpipe": count,
        "1f1b": min(num_parts, size - rank) - 1,
        "interleaved": min(count, (len(here) - 1) * per_round + 2 * (size - 1 - rank)),
    }[schedule]
    parts_of_turn = num_parts if len(here) == 1 else per_round

    def turn(number: int, stages_here: list[int]) -> tuple[int, int]:
        times, position = divmod(number, parts_of_turn)
        rounds, stage = divmod(times, len(stages_here))
        return stages_here[stage], rounds * parts_of_turn + position

    forwards = [Action("forward", *turn(number, here)) for number in range(count)]
    backwards = [Action("backward", *turn(number, here[::-1])) for number in range(count)]
    order = forwards[:in_flight]
    for forward, backward in zip(forwards[in_flight:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[count - in_flight :]


def _zbv(here: list[int], size: int, rank: int, num_parts: int) -> list[Action]:
    """Two stages on a rank, 0 on the way there and 1 on the way back, arXiv:2401.10241 section 6."""
    enough = max(2 * size - 1, num_parts)  # parts that fill the pipeline; those beyond `num_parts` are left out
    order: list[Action] = []
    done: dict[str, int] = dict.fromkeys(("F0", "F1", "I0", "I1", "W0", "W1"), 0)
    kinds: dict[str, Literal["forward", "backward_input", "backward_weight"]]
    kinds = {"F": "forward", "I": "backward_input", "W": "backward_weight"}

    def do(*steps: str) -> None:
        for step in steps:
            order.append(Action(kinds[step[0]], here[int(step[1])], done[step]))
            done[step] += 1

    do(*["F0"] * (2 * (size - rank) - 1), *["F1", "F0"] * rank, *["F1", "I1", "W1"] * (size - rank))
    while done["F1"] < done["F0"] or done["F0"] < enough:
        do(*["F0"] * (done["F0"] < enough), "I0", "W0", "F1", "I1", "W1")
    do(*["I0", "I1"] * rank, *["I0", "W0"] * (size - rank))
    do(*["W1"] * (done["I1"] - done["W1"]), *["W0"] * (done["I0"] - done["W0"]))
    return [action for action in order if action.part < num_parts]
