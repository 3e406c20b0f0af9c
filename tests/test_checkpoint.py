"""Checkpoints move between layouts and placements bit by bit; a rank that fails fails the save on every rank."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ep_engine import checkpoint
from ep_engine.entries import expected_entries
from ep_engine.errors import Fault
from ep_engine.mesh import World, process_groups
from ep_engine.model import Decoder
from ep_engine.model_config import read_model_config
from ep_engine.parallelize import build, entries_of
from ep_engine.placement import Placement
from ep_engine.training.optimizer import make_optimizer, moment_entries
from ep_engine.whole_model import read_model
from tests.distributed import run_ranks
from tests.moe_cases import shuffled_placement
from tests.run_cases import moe_model, small_run
from tests.small_models import assert_same_bits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_model(tmp_path_factory.mktemp("models"))


def placements(devices: int) -> dict[str, Placement]:
    one = shuffled_placement(8, devices)
    return {
        "by id": Placement.contiguous(8, devices, 2),
        "shuffled": one.model_copy(update={"layers": [one.layers[0], one.layers[0][::-1]]}),
    }


@pytest.mark.parametrize("name", ["by id", "shuffled"])
@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_any_layout_loads_and_saves_the_same_bits(
    world_size: int, ep_size: int, name: str, source: Path, tmp_path: Path
) -> None:
    run_ranks(_load_and_save, source, tmp_path / "again", ep_size, name, world_size=world_size)
    assert checkpoint.read_manifest(tmp_path / "again")["training"] == {"step": 3}
    sums = [checkpoint.read_manifest(folder)["checksums"] for folder in (source, tmp_path / "again")]
    weights = {name: value for name, value in sums[1].items() if "/" not in name}
    assert weights == sums[0]
    config, again = read_model(tmp_path / "again")
    _, before = read_model(source)
    assert config == read_model_config(source / "model.json")
    assert_same_bits(before, again)


def _load_and_save(rank: int, world_size: int, source: Path, out: Path, ep_size: int, name: str) -> None:
    with process_groups(World(rank=rank, size=world_size), CPU, ep_size, 60.0) as meshes:
        config = read_model_config(source / "model.json")
        stages, _ = build(config, placements(ep_size)[name], meshes, device=CPU, dtype=torch.float32)
        checkpoint.load(source, entries_of(stages), group=dist.group.WORLD)
        train = small_run(source.parent, "unused").train
        moments = moment_entries(stages, make_optimizer(stages, train))
        entries = {**entries_of(stages), **moments}
        checkpoint.save(out, config, entries, training={"step": 3}, source=source, group=dist.group.WORLD)


def test_no_expert_is_held_twice_or_left_out(source: Path) -> None:
    run_ranks(_check_experts, source, world_size=4)


def _check_experts(rank: int, world_size: int, source: Path) -> None:
    with process_groups(World(rank=rank, size=world_size), CPU, 2, 60.0) as meshes:
        config = read_model_config(source / "model.json")
        stages, _ = build(config, placements(2)["shuffled"], meshes, device=CPU, dtype=torch.float32)
        mine = [name for name in entries_of(stages) if "experts" in name]
        parts: list[list[str]] = [[]] * world_size
        dist.all_gather_object(parts, mine)
        everything = [name for part in parts for name in part]
        expected = [name for name in expected_entries(config) if "experts" in name]
        assert sorted(everything) == sorted(expected)
        assert len(mine) == len(expected) // world_size


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(source: Path) -> None:
    run_ranks(_load_other, source, world_size=2)


def _load_other(rank: int, world_size: int, source: Path) -> None:
    with process_groups(World(rank=rank, size=world_size), CPU, 1, 60.0) as meshes:
        config = read_model_config(source / "model.json").model_copy(update={"hidden_size": 16, "head_dim": 4})
        stages, _ = build(config, placements(1)["by id"], meshes, device=CPU, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"has shape .* the model expects .*; it is of another model"):
            checkpoint.load(source, entries_of(stages), group=dist.group.WORLD)


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_fails_on_one_rank_is_a_fault_on_all(full: int, source: Path, tmp_path: Path) -> None:
    run_ranks(_fill_the_disk, source, tmp_path / "again", full, world_size=2)
    assert list(tmp_path.iterdir()) == []


def test_words_that_the_leader_cannot_write_are_a_fault_on_all(source: Path, tmp_path: Path) -> None:
    run_ranks(_leave_the_leader_without_words, source, tmp_path / "again", world_size=2)
    assert list(tmp_path.iterdir()) == []


def _leave_the_leader_without_words(rank: int, world_size: int, source: Path, out: Path) -> None:
    with process_groups(World(rank=rank, size=world_size), CPU, 2, 60.0) as meshes:
        config = read_model_config(source / "model.json")
        stages, _ = build(config, placements(2)["by id"], meshes, device=CPU, dtype=torch.float32)
        checkpoint.load(source, entries_of(stages), group=dist.group.WORLD)
        no_json = {"step": {1, 2}}
        with pytest.raises(Fault, match="not JSON serializable"):
            checkpoint.save(out, config, entries_of(stages), training=no_json, group=dist.group.WORLD)


def _fill_the_disk(rank: int, world_size: int, source: Path, out: Path, full: int) -> None:
    with process_groups(World(rank=rank, size=world_size), CPU, 2, 60.0) as meshes:
        config = read_model_config(source / "model.json")
        stages, _ = build(config, placements(2)["by id"], meshes, device=CPU, dtype=torch.float32)
        checkpoint.load(source, entries_of(stages), group=dist.group.WORLD)
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
        with pytest.raises(Fault, match="no room to write"):
            checkpoint.save(out, config, entries_of(stages), group=dist.group.WORLD)


def test_a_model_in_one_process_loads_without_a_group(source: Path) -> None:
    model = Decoder(read_model_config(source / "model.json"))
    entries = entries_of([model])
    checkpoint.load(source, entries)
    sums = {name: f"{value:016x}" for name, value in checkpoint.checksums(entries, None).items()}
    assert sums == checkpoint.read_manifest(source)["checksums"]
