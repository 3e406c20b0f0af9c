"""Ranks are killed while they save, at any moment: the last complete checkpoint is found, and training goes on."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ep_engine import output
from ep_engine.checkpoint import newest, read_manifest
from ep_engine.config import RunConfig
from ep_engine.errors import Fault
from ep_engine.mesh import World
from ep_engine.output import whole_folder
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train
from ep_engine.whole_model import read_model
from tests.distributed import run_ranks
from tests.run_cases import moe_model, small_run, train_here, write_text

KILLS = 50
VICTIMS = [frozenset({0, 1}), frozenset({0}), frozenset({1})]
TIMEOUT_S = 20.0


def _run(folder: Path, name: str, steps: int, *, resume: bool, background: bool = True) -> RunConfig:
    return small_run(
        folder,
        name,
        model={"checkpoint": str(folder / "moe")},
        data={"heldout": None, "heldout_batches": 16},
        train={"steps": steps, "save_every": 1, "log_every": 1},
        parallel={"expert_parallel_size": 2, "timeout_s": TIMEOUT_S},
        output={"resume": resume, "keep_checkpoints": 2, "async_save": background},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text(tmp_path_factory.mktemp("runs"))
    moe_model(folder)
    return folder


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


def _step(run_folder: Path) -> int:
    checkpoint = newest(run_folder)
    assert checkpoint is not None
    step: int = read_manifest(checkpoint)["training"]["step"]
    return step


def _leftovers(run_folder: Path) -> list[str]:
    return [path.name for path in run_folder.rglob(".*") if ".partial-" in path.name]


@pytest.mark.slow
def test_kills_at_random_moments_of_a_save_leave_a_checkpoint_to_go_on_from(folder: Path) -> None:
    """Every run goes on from what the one before, killed, has left, and is killed in its turn."""
    first = _run(folder, "killed", 4, resume=False, background=False)
    run_ranks(_train, first, world_size=2)
    seconds = json.loads((folder / "killed/summary.json").read_text())["save_seconds"] / 4
    draw = random.Random(0)
    span = 2 * seconds
    steps = [_step(folder / "killed")]
    found_leftovers = 0
    for kill in range(KILLS):
        victims = VICTIMS[kill % len(VICTIMS)]
        config = _run(folder, "killed", 10_000, resume=True)
        run_ranks(_be_killed, config, victims, draw.random() * span, world_size=2, dying=victims)
        steps.append(_step(folder / "killed"))
        # A save beside training takes another time on every machine: about half of the kills shall come after one.
        span *= 0.8 if steps[-1] > steps[-2] else 1.25
        left = _leftovers(folder / "killed/checkpoints")
        found_leftovers += bool(left)
        assert len(left) <= 2  # of this death alone: a draft, and a checkpoint that was being deleted
    assert steps == sorted(steps)
    assert found_leftovers > 0  # some kills came in the middle of a save,
    assert len(set(steps)) > 2  # and some after one
    run_ranks(_train, _run(folder, "killed", steps[-1] + 2, resume=True), world_size=2)
    assert _leftovers(folder / "killed") == []
    last = newest(folder / "killed")
    assert last is not None
    dict(read_model(last)[1])  # every checksum
    lines = (folder / "killed/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps[-1] + 3))


def _be_killed(rank: int, world_size: int, config: RunConfig, victims: frozenset[int], moment: float) -> None:
    """Train, and lose `victims` so many seconds after the first save has begun."""
    pids = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    run = resolve(config, world_size)
    dist.barrier()
    armed = False

    def before_a_save(line: dict[str, Any]) -> None:
        nonlocal armed
        if not armed:
            armed = True
            _kill_later([pids[victim] for victim in victims], moment)

    if rank in victims:
        train(run, World(rank=rank, size=world_size), before_a_save)
    started = time.monotonic()
    with pytest.raises(Fault, match=r"look at the first rank that failed|was not written"):
        train(run, World(rank=rank, size=world_size), before_a_save)
    assert time.monotonic() - started < TIMEOUT_S


def _kill_later(pids: list[int], seconds: float) -> None:
    """From another process: a thread of the victim would have to wait for the interpreter."""
    if os.fork() == 0:
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _dying(work: Callable[..., None], moment: str) -> Callable[..., None]:
    """The same function of two paths; before or after it gives an output its name, this process is gone."""

    def die(new: Path, path: Path) -> None:
        is_output = Path(path).name.startswith(("step_", "out"))
        if moment == "after" or not is_output:
            work(new, path)
        if is_output:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


@pytest.mark.parametrize(("moment", "step"), [("before", 2), ("after", 3)])
def test_a_kill_beside_the_rename_leaves_the_old_or_the_new_checkpoint(moment: str, step: int, folder: Path) -> None:
    name = f"rename-{moment}"
    run_ranks(_train, _run(folder, name, 2, resume=False), world_size=2)
    config = _run(folder, name, 4, resume=True)
    run_ranks(_die_at_the_rename, config, moment, world_size=2, dying=frozenset({0}))
    assert _step(folder / name) == step
    run_ranks(_train, config, world_size=2)
    assert _step(folder / name) == 4
    assert _leftovers(folder / name) == []


def _die_at_the_rename(rank: int, world_size: int, config: RunConfig, moment: str) -> None:
    if rank == 0:
        os.rename = _dying(os.rename, moment)
        train_here(config, rank, world_size)
    with pytest.raises(Fault, match="look at the first rank that failed"):
        train_here(config, rank, world_size)


@pytest.mark.parametrize(("moment", "content"), [("before", "old"), ("after", "new")])
def test_a_kill_beside_the_swap_leaves_the_old_or_the_new_folder(moment: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    run_ranks(_die_at_the_swap, tmp_path / "out", moment, world_size=1, dying=frozenset({0}))
    assert (tmp_path / "out/file").read_text() == content
    assert len(_leftovers(tmp_path)) == 1


def _die_at_the_swap(rank: int, world_size: int, folder: Path, moment: str) -> None:
    output._exchange = _dying(output._exchange, moment)
    with whole_folder(folder, overwrite=True) as draft:
        (draft / "file").write_text("new")


def test_a_peer_that_falls_silent_during_a_save_is_a_fault_within_the_time_out(folder: Path) -> None:
    config = _run(folder, "silent", 10_000, resume=False)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"timeout_s": 2.0})})
    run_ranks(_fall_silent, config, world_size=2, dying=frozenset({1}))


def _fall_silent(rank: int, world_size: int, config: RunConfig) -> None:
    run = resolve(config, world_size)
    dist.barrier()
    pids = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        train(run, World(rank=rank, size=world_size))
    stopped: list[float] = []

    def before_a_save(line: dict[str, Any]) -> None:
        if not stopped:
            stopped.append(time.monotonic())
            os.kill(pids[1], signal.SIGSTOP)

    with pytest.raises(Fault, match="look at the first rank that failed"):
        train(run, World(rank=rank, size=world_size), before_a_save)
    assert time.monotonic() - stopped[0] < 3 * 2.0  # the loop's time-out, and the thread's
    os.kill(pids[1], signal.SIGKILL)
