"""Every way a run can be impossible: the sentence, and that a refusal leaves no trace."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ep_engine.c2r.collaboration import collaboration_lists
from ep_engine.checkpoint import hash_of_model
from ep_engine.errors import UserError
from ep_engine.placement import Placement
from tests.counts import random_profile
from tests.run_cases import NEW_MODEL
from tests.run_files import contents, make_files, resolve_run
from tests.small_models import edit_json

C2R = ("routing.rule=c2r", "routing.profile={files}/profile.npz")
PP2 = ("parallel.pipeline_parallel_size=2", "train.micro_batches=2")
DEEP = ("model.checkpoint={files}/deep",)
GROUPED = ("routing.rule=c2r_grouped", "routing.profile={files}/profile.npz", "routing.top_t=3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = make_files(tmp_path_factory.mktemp("files"))
    for name, change in (("deep", {"num_layers": 4}), ("tied", {"num_layers": 4, "tie_embeddings": True})):
        shutil.copytree(files / "dense-engine", files / name)
        edit_json(files / name / "model.json", lambda model, change=change: model.update(change))
    return files


# ranks, overrides, sentence
REFUSALS: dict[str, tuple[int, tuple[str, ...], str]] = {
    "other number of ranks": (
        2,
        ("parallel.data_parallel_size=4",),
        r"^parallel\.data_parallel_size \(4\) needs 4 ranks, but the job has 2 \(WORLD_SIZE\); start torchrun with 4,",
    ),
    "ep does not divide the ranks": (
        3,
        ("parallel.expert_parallel_size=2", "data.batch_size=6"),
        r"^parallel\.expert_parallel_size \(2\) must divide the 3 ranks of the job \(WORLD_SIZE\); choose another",
    ),
    "more ep than ranks": (2, ("parallel.expert_parallel_size=4",), r"size \(4\) must divide the 2 ranks of the job"),
    "more ep than experts": (
        16,
        ("parallel.expert_parallel_size=16", "data.batch_size=16"),
        r"^parallel\.expert_parallel_size \(16\) is larger than the model's number of experts \(8\): every rank must",
    ),
    "tp does not divide the ranks": (
        3,
        ("parallel.tensor_parallel_size=2", "data.batch_size=6"),
        r"^parallel\.tensor_parallel_size \(2\) must divide the 3 ranks of the job \(WORLD_SIZE\); choose another",
    ),
    "other number of ranks times tp": (
        4,
        ("parallel.data_parallel_size=4", "parallel.tensor_parallel_size=2"),
        r"^parallel\.data_parallel_size \(4\) times parallel\.tensor_parallel_size \(2\) needs 8 ranks, but the job",
    ),
    "more tp than key/value heads": (
        4,
        ("parallel.tensor_parallel_size=4",),
        r"^parallel\.tensor_parallel_size \(4\) must divide the model's number of key/value heads \(2\); choose",
    ),
    "tp does not divide the sequence": (
        2,
        ("parallel.tensor_parallel_size=2", "data.sequence_length=15"),
        r"^parallel\.tensor_parallel_size \(2\) must divide data\.sequence_length \(15\); choose a smaller one$",
    ),
    "ep times etp does not divide the ranks": (
        4,
        ("parallel.expert_parallel_size=2", "parallel.expert_tensor_parallel_size=4"),
        r"^parallel\.expert_parallel_size \(2\) times parallel\.expert_tensor_parallel_size \(4\) must divide the",
    ),
    "etp does not divide an expert": (
        4,
        ("parallel.expert_tensor_parallel_size=4",),
        r"^parallel\.expert_tensor_parallel_size \(4\) must divide the hidden size of the model's experts \(6\);",
    ),
    "pp does not divide the ranks": (
        3,
        (*PP2, "data.batch_size=6"),
        r"^parallel\.tensor_parallel_size \(1\) times parallel\.pipeline_parallel_size \(2\) must divide the 3 ranks",
    ),
    "ep times pp does not divide the ranks": (
        6,
        (*PP2, "parallel.expert_parallel_size=2", "data.batch_size=12"),
        r"^parallel\.expert_parallel_size \(2\) times parallel\.pipeline_parallel_size \(2\) must divide the 6 ranks",
    ),
    "schedule without a pipeline": (
        1,
        ("parallel.pipeline_schedule=zbv",),
        r"^parallel\.pipeline_schedule has no effect without parallel\.pipeline_parallel_size; set that too$",
    ),
    "more stages than layers": (
        2,
        (*PP2, "parallel.pipeline_schedule=zbv"),
        r"^a pipeline of 4 stages \(parallel\.pipeline_parallel_size 2, schedule zbv\) needs as many layers, .* has 2;",
    ),
    "layers that do not add up": (
        2,
        (*PP2, "parallel.pipeline_layers=[2, 1]"),
        r"^parallel\.pipeline_layers \[2, 1\] adds up to 3 layers, the model has 2; correct it$",
    ),
    "stages that the schedule has not": (
        2,
        (*PP2, "parallel.pipeline_layers=[2]"),
        r"^parallel\.pipeline_layers names 1 stages, but schedule 1f1b on 2 ranks has 2; correct it$",
    ),
    "fewer parts than stages": (
        2,
        ("parallel.pipeline_parallel_size=2",),
        r"^train\.micro_batches \(1\) must be at least parallel\.pipeline_parallel_size \(2\) for schedule 1f1b, or",
    ),
    "parts that do not fill rounds": (
        2,
        (*PP2, "parallel.pipeline_schedule=interleaved", *DEEP, "train.micro_batches=5", "data.batch_size=10"),
        r"^train\.micro_batches \(5\) must be a multiple of 2 rounds of 2 ranks for schedule interleaved; use a multi",
    ),
    "zero bubble, computed again": (
        2,
        (*PP2, "parallel.pipeline_schedule=zbv", *DEEP, "train.recompute=full"),
        r"^train\.recompute is full and parallel\.pipeline_schedule zbv, which would compute every layer a third time;",
    ),
    "zero bubble, weights gathered again": (
        2,
        (*PP2, "parallel.pipeline_schedule=zbv", *DEEP, "parallel.reshard_after_forward=true"),
        r"^parallel\.reshard_after_forward is set and parallel\.pipeline_schedule is zbv, which needs the weights",
    ),
    "zero bubble, tied": (
        2,
        (*PP2, "parallel.pipeline_schedule=zbv", "model.checkpoint={files}/tied"),
        r"^parallel\.pipeline_schedule is zbv, whose first rank has the embedding and the head, and the model's head",
    ),
    "context parallel": (
        2,
        ("parallel.context_parallel_size=2",),
        r"^parallel\.context_parallel_size is not there yet: a row's positions stay together; split its seq",
    ),
    "uneven batch": (
        3,
        (),
        r"^data\.batch_size \(8\) must be a multiple of the 3 ranks that share it; choose another size$",
    ),
    "uneven parts": (
        2,
        ("train.micro_batches=3",),
        r"^data\.batch_size \(8\) must be a multiple of the 2 ranks that share it times train\.micro_batches \(3\);",
    ),
    "nothing to resume": (
        1,
        ("output.resume=true",),
        r"^output\.resume is set, but .*/run/checkpoints holds none; start without it$",
    ),
    "no checkpoint": (
        1,
        ("model.checkpoint={files}/none",),
        r"^.*/none holds no engine checkpoint \(no model\.json\); make one with `python -m checkpoint_tools convert`$",
    ),
    "no engine checkpoint": (1, ("model.checkpoint={files}/dense",), r"^.*/dense holds no engine checkpoint"),
    "placement is missing": (
        1,
        ("moe.placement={files}/none.json",),
        r"^placement .*none\.json cannot be read \(No such file or directory\); make one with `ep-engine place`$",
    ),
    "placement has no such cut": (
        4,
        ("moe.placement={files}/placement2.json", "parallel.expert_parallel_size=4"),
        r"^parallel\.expert_parallel_size \(4\) is no cut of the placement's tree \(2,\) of 2 devices; use one of 1,",
    ),
    "dense with ep": (
        2,
        ("model.checkpoint={files}/dense-engine", "parallel.expert_parallel_size=2"),
        r"^parallel\.expert_parallel_size \(2\) needs a model with experts, this one is dense; split it first$",
    ),
    "dense with a placement": (
        1,
        ("model.checkpoint={files}/dense-engine", "moe.placement={files}/placement2.json"),
        r"^\[moe\] needs a model with experts, this one is dense; split it first$",
    ),
    "dense with a rule": (
        1,
        ("model.checkpoint={files}/dense-engine", "routing.rule=topk"),
        r"^\[routing\] needs a model with experts, this one is dense; split it first$",
    ),
    "T without a rule": (
        1,
        ("routing.top_t=3",),
        r"^routing\.top_t is set without routing\.rule and has no effect; set the rule too$",
    ),
    "profile without a rule": (1, ("routing.profile=p.npz",), r"^routing\.profile is set without routing\.rule"),
    "devices without a rule": (1, ("routing.max_devices=2",), r"^routing\.max_devices is set without routing\.rule"),
    "c2r without a profile": (
        1,
        ("routing.rule=c2r", "routing.top_t=3"),
        r"^routing\.rule c2r needs routing\.profile; make one with `ep-engine profile`$",
    ),
    "grouped without a profile": (1, ("routing.rule=c2r_grouped",), r"^routing\.rule c2r_grouped needs routing\.prof"),
    "lists are missing": (
        1,
        ("routing.rule=c2r", "routing.profile=none.json"),
        r"^lists none\.json cannot be read .*; give a config\.json with collaborative_list$",
    ),
    "profile is missing": (
        1,
        ("routing.rule=c2r", "routing.profile=none.npz", "routing.top_t=3"),
        r"^profile none\.npz cannot be read .*; make one with `ep-engine profile`$",
    ),
    "T below k-1": (
        1,
        (*C2R, "routing.top_t=0"),
        r"routing\.top_t \(0\) must be in k-1\.\.E-1 = 1\.\.7 for k=2 of 8 experts; choose it there$",
    ),
    "T above E-1": (1, (*C2R, "routing.top_t=8"), r"routing\.top_t \(8\) must be in k-1\.\.E-1 = 1\.\.7 for k=2 of 8"),
    "no T": (1, C2R, r"routing\.top_t \(None\) must be in k-1\.\.E-1 = 1\.\.7"),
    "one device holds too few": (
        1,
        (*GROUPED, "moe.placement={files}/placement8.json"),
        r"routing\.max_devices \(1\) devices of layer 0 may hold only 1 experts, fewer than top_k \(2\); allow more",
    ),
    "sequence too long": (
        1,
        ("data.sequence_length=129",),
        r"^data\.sequence_length \(129\) is longer than the model's positions \(128\); choose a shorter one$",
    ),
    "no text": (1, ("data.train={files}/none",), r"^token file .*/none\.bin does not exist"),
    "no held-out text": (1, ("data.heldout={files}/none",), r"^token file .*/none\.bin does not exist"),
    "no tokenizer": (1, ("data.tokenizer={files}/none",), r"data\.tokenizer .*/none\b"),
    "too little text": (1, ("data.batch_size=250",), "train.* gives 249 windows of 16 tokens, but 250 are asked for"),
    "too little held-out text": (
        1,
        ("data.heldout_batches=32",),
        "heldout.* gives 249 windows of 16 tokens, but 256 are asked for",
    ),
}


def refuse(files: Path, folder: Path, sentence: str, *overrides: str, **options: Any) -> None:
    """Check that a run is refused in one line, and that every file stands as it stood."""
    before = contents(files, folder)
    with pytest.raises(UserError, match=sentence) as refused:
        resolve_run(files, folder, *overrides, **options)
    assert "\n" not in str(refused.value)
    after = contents(files, folder)
    for tree in (before, after):
        tree.pop(folder / "run.toml", None)  # the test itself writes it
    assert after == before


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_run_is_refused_without_a_trace(name: str, files: Path, tmp_path: Path) -> None:
    world_size, overrides, sentence = REFUSALS[name]
    refuse(files, tmp_path, sentence, *overrides, world_size=world_size)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"num_heads": 5}, r"^model\.hidden_size \(32\) must be a multiple of 2 \* model\.num_heads \(5\): rotary"),
        ({"num_heads": 32}, r"^model\.hidden_size \(32\) must be a multiple of 2 \* model\.num_heads \(32\)"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\); query heads share key heads"),
    ],
)
def test_sizes_that_make_no_model_are_refused(
    sizes: dict[str, int], sentence: str, files: Path, tmp_path: Path
) -> None:
    refuse(files, tmp_path, sentence, model={**NEW_MODEL, **sizes})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"], ids=["empty", "cut short", "a list", "no text"])
def test_damaged_model_file_is_refused(content: bytes, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "moe", tmp_path / "moe")
    (tmp_path / "moe" / "model.json").write_bytes(content)
    refuse(files, tmp_path, r"^.*/moe/model\.json\b(?!.*: :)", "model.checkpoint={out}/moe")


@pytest.mark.parametrize(("num_layers", "num_experts"), [(3, 8), (1, 8), (2, 6), (2, 9)])
def test_profile_of_another_model_is_refused(num_layers: int, num_experts: int, files: Path, tmp_path: Path) -> None:
    random_profile(num_layers, num_experts, seed=0).save(tmp_path / "other.npz")
    numbers = (num_layers, 2) if num_experts == 8 else (num_experts, 8)
    rule = ("routing.rule=c2r", "routing.top_t=3", "routing.profile={out}/other.npz")
    refuse(files, tmp_path, r"\b{}\b.*\b{}\b".format(*numbers), *rule)


def test_profile_of_other_weights_is_refused(files: Path, tmp_path: Path) -> None:
    for name, model_hash in (("one", hash_of_model(files / "moe")), ("other", "0" * 64)):
        replace(random_profile(2, 8, seed=0), about={"model_hash": model_hash}).save(tmp_path / f"{name}.npz")
    rule = ("routing.rule=c2r", "routing.top_t=3")
    resolve_run(files, tmp_path, *rule, "routing.profile={out}/one.npz")
    sentence = (
        r"^routing\.profile .*/other\.npz is of another model \(0{12}\) than model\.checkpoint .*/moe \(\w{12}\); "
    )
    refuse(files, tmp_path, sentence + "profile that one$", *rule, "routing.profile={out}/other.npz")


@pytest.mark.parametrize(("num_layers", "num_experts"), [(3, 8), (2, 6)])
def test_lists_of_another_model_are_refused(num_layers: int, num_experts: int, files: Path, tmp_path: Path) -> None:
    lists = collaboration_lists(random_profile(num_layers, num_experts, seed=0).counts)
    (tmp_path / "config.json").write_text(json.dumps({"collaborative_list": lists, "top_t": 3}))
    there, here = f"{num_layers} layers of {num_experts} experts", "2 layers of 8 experts"
    sentence = rf"^routing\.profile .* has {there}, the model {here}; profile this"
    refuse(files, tmp_path, sentence, "routing.rule=c2r", "routing.profile={out}/config.json")


@pytest.mark.parametrize(("num_layers", "num_experts"), [(3, 8), (1, 8), (2, 6), (2, 9)])
def test_placement_of_another_model_is_refused(num_layers: int, num_experts: int, files: Path, tmp_path: Path) -> None:
    Placement.contiguous(num_experts, 2, num_layers).save(tmp_path / "other.json")
    sentence = (
        rf"^moe\.placement .*other\.json has {num_layers} layers of {num_experts} experts, the model 2 layers of 8 "
        "experts; place a profile of this model$"
    )
    refuse(files, tmp_path, sentence, "moe.placement={out}/other.json")


def test_placement_that_lacks_an_expert_in_one_layer_is_refused(files: Path, tmp_path: Path) -> None:
    # Left alone, the op that plans would read beyond its table.
    slots = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]]
    (tmp_path / "p.json").write_text(json.dumps({"devices": 2, "factors": [2], "layers": slots}))
    refuse(files, tmp_path, "layer", "moe.placement={out}/p.json")


def test_a_grouped_model_keeps_its_groups_on_one_rank(files: Path, tmp_path: Path) -> None:
    """Its rule bounds the devices of a token only where a device of its training is part of a rank."""
    placed = (*GROUPED, "moe.placement={files}/placement2.json")
    trained = resolve_run(files, tmp_path, *placed).model
    shutil.copytree(files / "moe", tmp_path / "grouped")
    (tmp_path / "grouped" / "model.json").write_text(trained.model_dump_json())
    model = "model.checkpoint={out}/grouped"
    for fits in ((), ("parallel.expert_parallel_size=2",)):  # by id, as it was placed
        assert resolve_run(files, tmp_path, model, *fits, world_size=2).model == trained
    slots = [[0, 1, 2, 7, 4, 5, 6, 3]] * 2
    (tmp_path / "p.json").write_text(json.dumps({"devices": 2, "factors": [2], "layers": slots}))
    torn = (model, "moe.placement={out}/p.json", "parallel.expert_parallel_size=2")
    refuse(files, tmp_path, "rule is c2r_grouped, .* torn apart by ranks", *torn, world_size=2)


def test_more_experts_per_token_than_the_plan_sorts_is_refused(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "moe", tmp_path / "many")
    edit_json(tmp_path / "many" / "model.json", lambda model: model["moe"].update(num_experts=48, top_k=40))
    refuse(files, tmp_path, r"moe\.top_k of the model \(40\) must be at most 32", "model.checkpoint={out}/many")


UNREAD = {
    "topk and T": ("routing.rule=topk", "routing.top_t=3"),
    "topk and a profile": ("routing.rule=topk", "routing.profile={files}/profile.npz"),
    "topk and devices": ("routing.rule=topk", "routing.max_devices=2"),
    "c2r and devices": (*C2R, "routing.top_t=3", "routing.max_devices=2"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_key_that_the_rule_does_not_read_is_refused(name: str, files: Path, tmp_path: Path) -> None:
    key = UNREAD[name][-1].partition("=")[0].replace(".", r"\.")
    refuse(files, tmp_path, rf"{key}\b.*no effect", *UNREAD[name])


def test_more_devices_per_token_than_there_are_is_refused(files: Path, tmp_path: Path) -> None:
    overrides = (*GROUPED, "moe.placement={files}/placement4.json")
    assert resolve_run(files, tmp_path, *overrides, "routing.max_devices=4").model.moe is not None
    refuse(files, tmp_path, r"routing\.max_devices \(9\)", *overrides, "routing.max_devices=9")


@pytest.mark.parametrize(("training", "sentence"), [({"step": 6}, "at step 6 "), ({"step": 7}, "at step 7 "), ({}, "")])
def test_checkpoint_that_leaves_no_step_is_not_resumed(
    training: dict[str, int], sentence: str, files: Path, tmp_path: Path
) -> None:
    at = tmp_path / "run" / "checkpoints" / "step_000006"
    shutil.copytree(files / "moe", at)
    edit_json(at / "manifest.json", lambda manifest: manifest.update(training=training))
    refuse(files, tmp_path, rf"^.*/step_000006 .*{sentence}.*train\.steps is 6\b", "output.resume=true")


def test_run_folder_that_is_in_use_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    resolve_run(files, tmp_path)  # an empty folder is free
    for name in ("a", "b"):
        (tmp_path / "run" / name).touch()
    refuse(files, tmp_path, r"^output folder .*/run is not empty \(2 entries\); choose another or pass --overwrite$")


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_folder_that_is_a_file_is_refused(overwrite: bool, files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    sentence = r"^output .*/run is a file, expected a folder; choose another name$"
    refuse(files, tmp_path, sentence, overwrite=overwrite)


@pytest.mark.parametrize("key", ["model.checkpoint", "data.train", "routing.profile"])
def test_run_folder_that_holds_what_the_run_reads_is_refused(key: str, files: Path, tmp_path: Path) -> None:
    # With --overwrite the folder is deleted before the first step.
    shutil.copytree(files, tmp_path / "run")
    inside = {"model.checkpoint": "moe", "data.train": "train", "routing.profile": "profile.npz"}[key]
    rule = (*C2R, "routing.top_t=3")
    refuse(files, tmp_path, key.replace(".", r"\."), *rule, f"{key}={{out}}/run/{inside}", overwrite=True)
