"""Saves in the background are those of the foreground, from one copy, and what goes wrong comes out on all ranks."""

import logging
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_engine.checkpoint import read_manifest
from ep_engine.config import RunConfig
from ep_engine.entries import Shard, expected_entries
from ep_engine.errors import Fault
from ep_engine.model_config import read_model_config
from ep_engine.training.saver import Saver
from ep_engine.whole_model import read_model
from tests.distributed import run_ranks
from tests.run_cases import moe_model, small_run, train_here, write_text

LAYOUTS = {
    "one process": (1, {}),
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep2 x etp2": (4, {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "tp2 x dp2 x ep2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text(tmp_path_factory.mktemp("runs"))
    moe_model(folder)
    return folder


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_save_in_the_background_holds_the_weights_of_its_step(name: str, folder: Path) -> None:
    world_size, parallel = LAYOUTS[name]
    sums = []
    for background in (True, False):
        config = small_run(
            folder,
            f"{name.replace(' ', '-')}-{background}",
            model={"checkpoint": str(folder / "moe")},
            train={"steps": 4, "save_every": 1},
            parallel=parallel,
            output={"async_save": background},
        )
        run_ranks(_train, config, world_size=world_size)
        folders = sorted((config.output.folder / "checkpoints").iterdir())
        assert [path.name for path in folders] == [f"step_{step:06}" for step in (1, 2, 3, 4)]
        sums.append([read_manifest(path)["checksums"] for path in folders])
    assert sums[0] == sums[1]
    assert all(earlier != later for earlier, later in zip(sums[0], sums[0][1:], strict=False))


def _whole_model(folder: Path, fill: float) -> dict[str, Shard]:
    shapes = expected_entries(read_model_config(folder / "moe/model.json"))
    tensors = {name: torch.full(shape, fill, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return {name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}


def _saver(folder: Path, name: str) -> Saver:
    return Saver(folder / name, read_model_config(folder / "moe/model.json"), None, dist.group.WORLD, 60.0)


def test_a_second_save_waits_and_fills_the_same_copy(folder: Path) -> None:
    run_ranks(_save_twice, folder, world_size=1)


def _save_twice(rank: int, world_size: int, folder: Path) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ep_engine.training.saver").addHandler(handler)
    entries = _whole_model(folder, 1.0)
    with _saver(folder, "twice") as saver:
        places = set()
        for step in range(1, 5):
            for shard in entries.values():
                shard.tensor.fill_(step)
            saver.save(step, entries)
            places.add(tuple(shard.tensor.data_ptr() for shard in saver.copies.values()))
        for shard in entries.values():
            shard.tensor.fill_(-1)
        saver.wait()
    assert len(places) == 1
    assert heard == ["the save at step 2 waits for the one before: train.save_every is short"]
    assert saver.last == folder / "twice/checkpoints/step_000004"
    for step in range(1, 5):
        _, tensors = read_model(folder / f"twice/checkpoints/step_{step:06}")
        assert all((tensor == step).all() and tensor.dtype == torch.bfloat16 for tensor in tensors.values())


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_in_the_background_ends_all_ranks_after_the_same_step(full: int, folder: Path) -> None:
    config = small_run(
        folder,
        f"full-{full}",
        model={"checkpoint": str(folder / "moe")},
        train={"steps": 10_000, "save_every": 20, "log_every": 10_000},
        parallel={"expert_parallel_size": 2},
        moe={"transport": "collective"},  # shared memory is a file too, to this limit
    )
    run_ranks(_fill_the_disk, config, folder, full, world_size=2)
    sentences = [(folder / f"sentence-{full}-{rank}").read_text() for rank in range(2)]
    assert sentences[0] == sentences[1]
    assert list((config.output.folder / "checkpoints").iterdir()) == []
    lines = (config.output.folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1  # it came out before the next save


def _fill_the_disk(rank: int, world_size: int, config: RunConfig, folder: Path, full: int) -> None:
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    with pytest.raises(Fault, match=r"no room to write .*step_000020") as caught:
        train_here(config, rank, world_size)
    assert caught.value.everywhere
    (folder / f"sentence-{full}-{rank}").write_text(str(caught.value))
    dist.barrier()  # no rank failed in another collective


def test_the_end_of_a_run_waits_for_its_save(folder: Path) -> None:
    config = small_run(folder, "end", train={"steps": 2, "save_every": 1})
    summary = train_here(config)
    assert summary["save_seconds"] > 0
    names = sorted(path.name for path in (config.output.folder / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000002"]


def test_a_run_that_ends_badly_completes_the_save_under_way(folder: Path) -> None:
    run_ranks(_end_badly, folder, world_size=1)
    dict(read_model(folder / "bad/checkpoints/step_000001")[1])


def _end_badly(rank: int, world_size: int, folder: Path) -> None:
    started = time.monotonic()
    saver = _saver(folder, "bad")

    def run() -> None:
        with saver:
            saver.save(1, _whole_model(folder, 1.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert saver.last is not None
    assert time.monotonic() - started < 30
