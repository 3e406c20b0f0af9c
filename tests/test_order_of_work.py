"""The order in which a rank of a pipeline works, against torch's own."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from ep_engine.stages import Action, Schedule, Stages, order_of_work

KINDS = {"FORWARD": "forward", "FULL_BACKWARD": "backward"} | {
    k.upper(): k for k in ("backward_input", "backward_weight")
}


def of_torch(schedule: Any, stages: Stages, size: int, rank: int, parts: int) -> Iterator[Action]:
    """What torch's schedule plans for a rank; it asks itself for nothing but these numbers."""
    local = len(stages.on(rank))
    numbers = SimpleNamespace(
        pp_group_size=size,
        n_local_stages=local,
        num_stages=size * local,
        _n_microbatches=parts,
        microbatches_per_round=parts // max(1, parts // size),
    )
    for action in schedule._calculate_single_rank_operations(numbers, rank):
        if action is not None:
            yield Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)


@pytest.mark.parametrize(("size", "parts"), [(2, 2), (2, 4), (2, 6), (3, 3), (3, 7), (4, 4), (4, 8), (4, 12)])
def test_interleaved_and_zbv_are_those_of_torch(size: int, parts: int) -> None:
    for name, schedule in (("interleaved", ScheduleInterleaved1F1B), ("zbv", ScheduleZBVZeroBubble)):
        if name == "interleaved" and parts % max(1, parts // size):
            continue
        stages = Stages.of(2 * size, size, name)
        for rank in range(size):
            expected = list(of_torch(schedule, stages, size, rank, parts))
            assert order_of_work(stages, size, rank, name, parts) == expected, (name, rank)


def test_gpipe_and_1f1b_by_hand() -> None:
    def text(schedule: Schedule, rank: int) -> str:
        order = order_of_work(Stages.of(3, 3, schedule), 3, rank, schedule, 4)
        return " ".join(f"{action.kind[0]}{action.part}" for action in order)

    assert text("gpipe", 0) == "f0 f1 f2 f3 b0 b1 b2 b3"
    assert text("1f1b", 0) == "f0 f1 f2 b0 f3 b1 b2 b3"
    assert text("1f1b", 1) == "f0 f1 b0 f2 b1 f3 b2 b3"
    assert text("1f1b", 2) == "f0 b0 f1 b1 f2 b2 f3 b3"


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_part_goes_forward_and_back_once(schedule: Schedule) -> None:
    for rank in range(3):
        stages = Stages.of(6, 3, schedule)
        order = order_of_work(stages, 3, rank, schedule, 6)
        for kind in KINDS.values():
            halves = schedule == "zbv"
            wanted = kind == "forward" or halves == kind.startswith("backward_")
            expected = [(stage, part) for stage in stages.on(rank) for part in range(6)] if wanted else []
            assert sorted((a.stage, a.part) for a in order if a.kind == kind) == expected


def test_one_rank_goes_back_after_every_part() -> None:
    order = order_of_work(Stages.of(2, 1, "1f1b"), 1, 0, "1f1b", 2)
    assert [(a.kind, a.part) for a in order] == [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1)]
