"""The stopwatch: parts within parts, waiting told from moving, and steps whose bits it does not change."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.config import RunConfig
from ep_engine.recompute import computed_again
from ep_engine.stopwatch import EXCHANGE, PARTS, Stopwatch, part, running, split, time_backward, timed
from tests.distributed import run_ranks
from tests.run_cases import losses, moe_folder, small_run, train_here
from tests.small_models import dense_folder, moe_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = moe_folder(tmp_path_factory.mktemp("runs"))
    moe_checkpoint(folder / "moe4", dense_folder(folder / "dense4", num_hidden_layers=4))
    return folder


def watch_with(*marks: tuple[str, bool, float]) -> Stopwatch:
    watch = Stopwatch(CPU)
    watch._marks.extend(marks)
    return watch


def test_time_belongs_to_the_innermost_part() -> None:
    marks = [
        ("other", True, 0.0),
        ("dispatch", True, 1.0),
        (EXCHANGE, True, 1.5),
        (EXCHANGE, False, 3.5),
        ("dispatch", False, 4.0),
        ("attention", True, 6.0),
        ("attention", True, 7.0),  # computed again within its backward
        ("attention", False, 8.0),
        ("attention", False, 10.0),
        ("other", False, 11.0),
    ]
    own, exchanges = watch_with(*marks).seconds()
    assert own == {"other": 1.0 + 2.0 + 1.0, "dispatch": 0.5 + 0.5, "attention": 4.0}
    assert exchanges == [("dispatch", 2.0)]


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), max_size=30))
def test_no_time_is_lost_or_counted_twice(marks: list[tuple[str, bool]]) -> None:
    """Whatever is left open, or ends without a begin, as hooks of a backward in two halves may do."""
    times = [float(2**i) for i in range(len(marks) + 2)]
    names = [("other", True), *marks, ("other", False)]
    own, _ = watch_with(*((*name, at) for name, at in zip(names, times, strict=True))).seconds()
    assert sum(own.values()) == times[-1] - times[0]


def test_nothing_is_marked_while_none_runs() -> None:
    @timed("experts")
    def twice(x: int) -> int:
        return 2 * x

    assert twice(3) == 6
    with running(CPU) as watch:
        assert twice(4) == 8
    assert twice(5) == 10
    assert [mark[:2] for mark in watch._marks] == [
        ("other", True),
        ("experts", True),
        ("experts", False),
        ("other", False),
    ]


def test_a_step_that_fails_leaves_no_stopwatch_behind() -> None:
    with pytest.raises(ValueError, match="in the step"), running(CPU), part("experts"):
        raise ValueError("in the step")
    with part("experts"):
        pass
    with running(CPU) as watch:
        pass
    assert len(watch._marks) == 2


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return grads[0]


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_is_timed(again: bool) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Slow.apply(x)
        time_backward("attention", x, y)
        return y

    leaf = torch.ones(3, requires_grad=True)
    with running(CPU) as watch:
        x: torch.Tensor = _Slow.apply(leaf)
        y: torch.Tensor = _Slow.apply(x + (computed_again(inside, x) if again else inside(x)))
        y.sum().backward()
    own, _ = watch.seconds()
    assert own["attention"] >= 0.05
    assert own["other"] >= 0.1  # two more that are slow, outside
    assert sum(mark[0] == "attention" for mark in watch._marks) == 2
    inside(torch.ones(3))  # frozen inputs have no backward to time


def test_a_slow_rank_is_waited_for() -> None:
    run_ranks(_wait, world_size=2)


def _wait(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    # The first rank has 2 s of experts, the second waits for it; then the other way round with attention, until a sum
    # of gradients, in which the first waits. Rows travel for half a second, and the rest takes as long.
    began, met, attended = (2.0, 2.5, 2.5) if rank == 0 else (0.0, 2.5, 4.5)
    watch = watch_with(
        ("other", True, 0.0),
        ("experts", True, 0.0),
        ("experts", False, began),
        ("combine", True, began),
        (EXCHANGE, True, began),
        (EXCHANGE, False, met),
        ("combine", False, met),
        ("attention", True, met),
        ("attention", False, attended),
        ("other", False, 5.0),
    )
    found = split(watch, CPU, group, group, group)
    assert found == {
        "dispatch": 0.0,
        "experts": 1.0,
        "combine": 0.5,
        "attention": 1.0,
        "optimiser": 0.0,
        "waiting": 2.0,
        "other": 0.5,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "ep2, computed again": (2, {"expert_parallel_size": 2}, {"recompute": "full"}),
    "tp2 ep2": (2, {"expert_parallel_size": 2, "tensor_parallel_size": 2}, {"recompute": "selective"}),
    "pp2 zbv": (2, {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}, {"micro_batches": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_timed_step_has_the_same_bits(layout: str, folder: Path) -> None:
    ranks, parallel, train = LAYOUTS[layout]
    model = {"checkpoint": str(folder / "moe4")}
    timed, untimed = (
        small_run(
            folder, f"{layout} {every}", model=model, parallel=parallel, train={**train, "steps": 4, "log_every": every}
        )
        for every in (1, 4)
    )
    for config in (timed, untimed):
        run_ranks(_train, config, world_size=ranks)
    assert losses(timed) == losses(untimed)
    lines = [json.loads(line) for line in (timed.output.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        found = line["seconds_of_step"]
        assert tuple(found) == PARTS
        assert all(seconds > 0 for seconds in found.values())
        if ranks == 1:  # the line's clock is that of the first of several, which may come late to a step
            step = timed.data.batch_size * timed.data.sequence_length / line["tokens_per_second"]
            assert sum(found.values()) < step


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank=rank, world_size=world_size)


def test_a_line_before_a_save_tells_no_step_that_was_not_timed(folder: Path) -> None:
    config = small_run(folder, "saves", train={"steps": 6, "log_every": 2, "save_every": 3})
    train_here(config)
    lines = [json.loads(line) for line in (config.output.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "seconds_of_step" in line) for line in lines] == [
        (2, True),
        (3, False),
        (4, True),
        (6, True),
    ]
