"""From a run file to a run that can start: models, placements, selection rules, and what is resumed."""

import json
import shutil
from pathlib import Path

import pytest

from ep_engine.c2r.collaboration import collaboration_lists, read_profile
from ep_engine.config import load_config
from ep_engine.model_config import MoEConfig, read_model_config
from ep_engine.placement import Placement
from ep_engine.resolve import resolve
from tests.counts import random_profile
from tests.run_cases import NEW_MODEL
from tests.run_files import contents, drop_key, make_files, resolve_run, write_run
from tests.small_models import edit_json, routing_tables

GROUPED = ("routing.rule=c2r_grouped", "routing.profile={files}/profile.npz", "routing.top_t=3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def moe_of(files: Path, folder: Path, *overrides: str, **options: int) -> MoEConfig:
    moe = resolve_run(files, folder, *overrides, **options).model.moe
    assert moe is not None
    return moe


def test_moe_run_starts_from_its_checkpoint_and_makes_nothing(files: Path, tmp_path: Path) -> None:
    run = resolve_run(files, tmp_path, "parallel.expert_parallel_size=2", world_size=4)
    assert run.model == read_model_config(files / "moe" / "model.json")
    assert run.placement == Placement.contiguous(8, 2, 2)
    assert (run.checkpoint, run.resume) == (files / "moe", None)
    assert (run.train["all"].bin_path, run.heldout["all"].bin_path) == (files / "train.bin", files / "heldout.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_new_dense_run_has_neither_checkpoint_nor_placement(files: Path, tmp_path: Path) -> None:
    run = resolve_run(files, tmp_path, "model.rope_theta=5e5", "model.tie_embeddings=true", model=NEW_MODEL)
    assert (run.checkpoint, run.resume, run.placement, run.model.moe) == (None, None, None, None)
    assert (run.model.head_dim, run.model.num_kv_heads) == (8, 2)
    assert (run.model.rope_theta, run.model.tie_embeddings) == (5e5, True)


def test_key_heads_of_a_new_model_are_its_heads_unless_they_are_given(files: Path, tmp_path: Path) -> None:
    path = write_run(files, tmp_path, NEW_MODEL)
    assert resolve(load_config(path), 1).model.num_kv_heads == 2
    drop_key(path, "num_kv_heads")
    assert resolve(load_config(path), 1).model.num_kv_heads == 4


def test_uneven_experts_are_placed_on_three_ranks(files: Path, tmp_path: Path) -> None:
    run = resolve_run(files, tmp_path, "parallel.expert_parallel_size=3", "data.batch_size=6", world_size=3)
    assert run.placement == Placement.contiguous(8, 3, 2)


def test_placement_of_more_devices_than_ranks_is_cut(files: Path, tmp_path: Path) -> None:
    ep = ("parallel.expert_parallel_size=2", "moe.placement={files}/placement8.json")
    run = resolve_run(files, tmp_path, *ep, world_size=2)
    assert run.placement == Placement.contiguous(8, 8, 2)


def test_heldout_text_may_be_left_out(files: Path, tmp_path: Path) -> None:
    path = write_run(files, tmp_path)
    drop_key(path, "heldout")
    drop_key(path, "heldout_batches")
    assert resolve(load_config(path), 1).heldout == {}


def test_rule_of_the_model_stays_unless_the_run_sets_one(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "moe", tmp_path / "c2r")
    edit_json(tmp_path / "c2r" / "model.json", lambda model: model["moe"]["routing"].update(routing_tables("c2r")))
    checkpoint = "model.checkpoint={out}/c2r"

    kept = moe_of(files, tmp_path, checkpoint)
    replaced = moe_of(files, tmp_path, checkpoint, "routing.rule=topk")

    assert kept == read_model_config(tmp_path / "c2r" / "model.json").moe
    assert kept.routing.rule == "c2r"
    assert replaced.routing.model_dump(exclude_defaults=True) == {}


@pytest.mark.parametrize("top_t", [1, 3, 7])
def test_c2r_gets_the_lists_of_the_profile(top_t: int, files: Path, tmp_path: Path) -> None:
    rule = ("routing.rule=c2r", "routing.profile={files}/profile.npz", f"routing.top_t={top_t}")
    assert moe_of(files, tmp_path, *rule).routing.model_dump(exclude_defaults=True) == {
        "rule": "c2r",
        "top_t": top_t,
        "lists": collaboration_lists(read_profile(files / "profile.npz").counts),
    }


def test_c2r_gets_published_lists_with_their_t(files: Path, tmp_path: Path) -> None:
    lists = collaboration_lists(random_profile(2, 8, seed=5).counts)
    (tmp_path / "config.json").write_text(json.dumps({"collaborative_list": lists, "top_t": 4}))
    rule = ("routing.rule=c2r", "routing.profile={out}/config.json")
    for more, top_t in (((), 4), (("routing.top_t=2",), 2)):
        found = moe_of(files, tmp_path, *rule, *more).routing
        assert found.model_dump(exclude_defaults=True) == {"rule": "c2r", "top_t": top_t, "lists": lists}


def test_c2r_grouped_gets_the_devices_of_the_placement_not_of_its_cut(files: Path, tmp_path: Path) -> None:
    slots = [[0, 7, 1, 6, 2, 5, 3, 4], [0, 2, 4, 6, 1, 3, 5, 7]]
    Placement(devices=4, factors=(2, 2), layers=slots).save(tmp_path / "p.json")
    rest = ("moe.placement={out}/p.json", "routing.max_devices=2", "parallel.expert_parallel_size=2")
    routing = moe_of(files, tmp_path, *GROUPED, *rest, world_size=2).routing
    assert routing.device_of_expert == [[0, 1, 2, 3, 3, 2, 1, 0], [0, 2, 0, 2, 1, 3, 1, 3]]
    assert (routing.rule, routing.max_devices, routing.top_t) == ("c2r_grouped", 2, 3)


def checkpoint_at(step: int, files: Path, folder: Path) -> Path:
    """A checkpoint of a run, as far as `resolve` looks at it."""
    at = folder / "run" / "checkpoints" / f"step_{step:06}"
    shutil.copytree(files / "moe", at)
    edit_json(at / "manifest.json", lambda manifest: manifest.update(training={"step": step}))
    return at


def test_resume_takes_the_last_checkpoint_of_the_run(files: Path, tmp_path: Path) -> None:
    for step in (5, 20):
        last = checkpoint_at(step, files, tmp_path)
    before = contents(tmp_path / "run")
    run = resolve_run(files, tmp_path, "output.resume=true", "train.steps=21")
    assert (run.checkpoint, run.resume) == (last, last)
    assert contents(tmp_path / "run") == before


def test_the_last_checkpoint_is_the_one_of_most_steps(files: Path, tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):  # a name of another length
        last = checkpoint_at(step, files, tmp_path)
    assert resolve_run(files, tmp_path, "output.resume=true", "train.steps=2_000_000").resume == last


def test_a_resumed_run_may_change_its_rule(files: Path, tmp_path: Path) -> None:
    checkpoint_at(3, files, tmp_path)
    rule = ("routing.rule=c2r", "routing.profile={files}/profile.npz", "routing.top_t=2")
    assert moe_of(files, tmp_path, "output.resume=true", *rule).routing.rule == "c2r"


def test_overwrite_lets_a_full_run_folder_pass_and_touches_nothing(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"old": 1}))
    before = contents(tmp_path / "run")
    resolve_run(files, tmp_path, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_a_restarted_run_goes_on_from_its_last_checkpoint_without_being_asked(files: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        last = checkpoint_at(step, files, tmp_path)
    before = contents(tmp_path / "run")
    config = load_config(write_run(files, tmp_path))
    assert resolve(config, 1, restarted=True).resume == last
    # All steps are done, but not all that follows them.
    assert resolve(load_config(tmp_path / "run.toml", ["train.steps=4"]), 1, restarted=True).resume == last
    assert contents(tmp_path / "run") == before


def test_a_restarted_run_begins_again_where_there_is_no_checkpoint_yet(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    run = resolve(load_config(write_run(files, tmp_path)), 1, restarted=True)
    assert (run.checkpoint, run.resume) == (files / "moe", None)
