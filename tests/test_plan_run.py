"""`ep-engine plan`: what it prints and refuses; its groups against a job's, its dense traffic against a step's."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_engine.c2r.collaboration import read_profile
from ep_engine.config import RunConfig
from ep_engine.ledger import DIRECTIONS, TIERS
from ep_engine.mesh import World, process_groups
from ep_engine.model_config import read_model_config
from ep_engine.planning.memory import KINDS
from ep_engine.planning.plan_run import plan_run
from ep_engine.planning.routing_trace import draw_routing, read_trace, save_trace
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.run_cases import NEW_MODEL, small_run
from tests.run_files import contents, make_files, write_run

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


FOUR = ("parallel.expert_parallel_size=2", "parallel.tensor_parallel_size=2", "--ranks", 4)


def test_json_has_groups_memory_and_traffic(run: Command, files: Path, tmp_path: Path) -> None:
    status, out, err = run("plan", write_run(files, tmp_path), *FOUR, "--ranks-per-node", 2, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan.keys() == {
        "ranks",
        "ranks_per_node",
        "dtype",
        "routing",
        "transport",
        "ignored",
        "groups",
        "memory",
        "traffic",
    }
    assert plan["ignored"] == []
    assert (plan["ranks"], plan["ranks_per_node"], plan["dtype"]) == (4, 2, "float32")
    assert (plan["routing"], plan["transport"]) == ("uniform random, seed 0", "shared_memory")
    third = {"rank": 2, "node": 1, "layers": [0, 1], "pp": [2], "dp": [0, 2], "tp": [2, 3], "edp": [0, 2]}
    assert plan["groups"][2] == third | {"ep": [2, 3], "etp": [2], "dispatch": [2, 3], "stage": [0, 1, 2, 3]}
    for one in plan["memory"]["ranks"]:
        assert list(one["bytes"]) == list(KINDS)
        assert sum(one["bytes"].values()) == one["total"]
    assert sorted(rank for one in plan["memory"]["alike"] for rank in one["ranks"]) == [0, 1, 2, 3]
    experts = plan["traffic"]["experts"]
    assert [layer["layer"] for layer in experts["layers"]] == [0, 1]
    for direction in DIRECTIONS:
        for tier in TIERS:
            assert experts["total"][direction][tier] == sum(layer[direction][tier] for layer in experts["layers"])
            of_ranks = plan["traffic"]["experts_of_ranks"]
            assert experts["total"][direction][tier] == sum(rank[direction][tier] for rank in of_ranks)
    assert [set(rank) for rank in plan["traffic"]["dense_of_ranks"]] == [
        {"gather_weights", "reduce_gradients", "tensor_parallel", "pipeline"}
    ] * 4


def test_tables_are_shown_and_nothing_is_made(run: Command, files: Path, tmp_path: Path) -> None:
    run_file = write_run(files, tmp_path)
    before = contents(files, tmp_path)
    status, out, err = run("plan", run_file, *FOUR)
    assert (status, err) == (0, "")
    assert out.startswith("4 ranks, 4 on a node, float32; experts' rows over shared_memory; routing: uniform random")
    for title in ("Groups of every rank", "Most memory of a rank", "Experts' rows that leave", "What else leaves"):
        assert title in out
    assert contents(files, tmp_path) == before


def test_what_the_plan_does_not_know_is_told(run: Command, files: Path, tmp_path: Path) -> None:
    run_file = write_run(files, tmp_path)
    more = ("data.packing=documents", 'train.freeze=["embed.*"]', "--ranks", 1)
    status, out, _ = run("plan", run_file, *more)
    assert status == 0
    frozen, padding = json.loads(run("plan", run_file, *more, "--json")[1])["ignored"]
    assert frozen == "that frozen weights keep less for the backward: activations are those of training all"
    assert padding.startswith("how much of the rows is padding with data.packing documents: it is counted like other")
    for what in (frozen, padding):
        assert f"The plan does not know {what}." in " ".join(out.split())


def test_neither_data_nor_weights_nor_a_free_folder_are_needed(run: Command, files: Path, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "model.json").write_bytes((files / "moe" / "model.json").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    overrides = (f"model.checkpoint={tmp_path / 'only'}", "data.train=none", "data.heldout=none")
    assert run("plan", write_run(files, tmp_path), *overrides, "--ranks", 2)[0] == 0


def test_a_dense_model_has_no_experts_traffic(run: Command, files: Path, tmp_path: Path) -> None:
    status, out, _ = run("plan", write_run(files, tmp_path, NEW_MODEL), "--ranks", 2, "--json")
    plan = json.loads(out)
    assert (status, plan["routing"], plan["transport"]) == (0, "none: the model is dense", "none")
    assert plan["traffic"]["experts"]["layers"] == []
    assert run("plan", write_run(files, tmp_path, NEW_MODEL), "--ranks", 2)[0] == 0


def test_a_trace_or_a_profile_takes_the_place_of_uniform_routing(run: Command, files: Path, tmp_path: Path) -> None:
    run_file = write_run(files, tmp_path)
    model = resolve(small_run(files, "x", model={"checkpoint": str(files / "moe")}), 1).model
    save_trace(tmp_path / "t.npz", draw_routing(model, 128, seed=5).numpy())
    ep = ("parallel.expert_parallel_size=2", "--ranks", 2, "--json")
    uniform, seeded, traced, profiled = (
        json.loads(run("plan", run_file, *ep, *more)[1])
        for more in ((), ("--seed", 5), ("--trace", tmp_path / "t.npz"), ("--trace", files / "profile.npz"))
    )
    assert traced["traffic"] == seeded["traffic"] != uniform["traffic"]
    assert traced["routing"] == f"trace {tmp_path / 't.npz'}"
    assert profiled["routing"] == f"drawn with the loads of profile {files / 'profile.npz'}, seed 0"


def test_a_large_step_is_counted_from_a_part_of_its_tokens(files: Path) -> None:
    def plan(length: int) -> dict[str, Any]:
        data = {"sequence_length": length, "batch_size": 1024}
        parallel = {"expert_parallel_size": 2}
        return plan_run(
            small_run(files, "x", model={"checkpoint": str(files / "moe")}, data=data, parallel=parallel), 2
        )

    one, two = plan(64), plan(128)
    assert (one["routing"], two["routing"]) == ("uniform random, seed 0", "uniform random, seed 0, 1 of 2 tokens")
    for direction, tiers in one["traffic"]["experts"]["total"].items():
        assert two["traffic"]["experts"]["total"][direction] == {tier: 2 * size for tier, size in tiers.items()}


def test_a_profiled_text_leaves_a_trace_to_plan_with(run: Command, files: Path, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.npz", tmp_path / "p.npz"
    text = ("--tokens", files / "train", "--out", out, "--max-tokens", 200, "--sequence-length", 16)
    assert run("profile", files / "moe", *text, "--trace", trace)[0] == 0
    model = read_model_config(files / "moe" / "model.json")
    ids, _ = read_trace(trace, model, 192, seed=0)
    assert [torch.bincount(of_layer.flatten(), minlength=8).tolist() for of_layer in ids] == read_profile(
        out
    ).load.tolist()
    status, _, err = run("profile", files / "moe", *text, "--overwrite", "--trace", tmp_path)
    assert (status, err.count("is a folder")) == (2, 1)
    ep = ("parallel.expert_parallel_size=2", "--ranks", 2, "--trace", trace)
    assert run("plan", write_run(files, tmp_path), *ep)[0] == 0


# arguments after the run file, and the sentence
REFUSALS: dict[str, tuple[str, str]] = {
    "no ranks": ("", r"^Missing option '--ranks'; see --help\n$"),
    "ranks that do not divide": (
        "parallel.expert_parallel_size=2 --ranks 3",
        r"^parallel\.expert_parallel_size \(2\) must divide the 3 ranks of the job \(WORLD_SIZE\)",
    ),
    "nodes that do not divide": (
        "--ranks 8 --ranks-per-node 3",
        r"^--ranks-per-node \(3\) must divide --ranks \(8\): nodes have the same number; correct one\n$",
    ),
    "a schedule without parts": (
        "parallel.pipeline_parallel_size=2 --ranks 2",
        r"^train\.micro_batches \(1\) must be at least parallel\.pipeline_parallel_size \(2\)",
    ),
    "shared memory over nodes": (
        "parallel.expert_parallel_size=4 moe.transport=shared_memory --ranks 4 --ranks-per-node 2",
        r"^moe\.transport is shared_memory, but the 4 ranks of an expert-parallel group do not lie on one node",
    ),
    "too few fixed rows": (
        "parallel.expert_parallel_size=2 moe.fixed_rows=2 --ranks 2",
        r"^moe\.fixed_rows \(2\) is less than the \d+ rows that layer \d has for a rank with this routing; raise it",
    ),
    "no trace": (
        "--ranks 1 --trace {out}/none.npz",
        r"^trace .*/none\.npz cannot be read \(.*\); give an \.npz with `ids` \(L, T, K\)\n$",
    ),
    "a trace of a dense model": (
        "model.checkpoint={files}/dense-engine --ranks 1 --trace {files}/profile.npz",
        r"^--trace .* has no effect on a dense model; leave it out\n$",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_one_sentence_and_status_2(name: str, run: Command, files: Path, tmp_path: Path) -> None:
    line, sentence = REFUSALS[name]
    run_file = write_run(files, tmp_path)
    before = contents(files, tmp_path)
    status, out, err = run("plan", run_file, *line.format(files=files, out=tmp_path).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)
    assert contents(files, tmp_path) == before


def test_groups_are_those_that_a_job_makes(files: Path, tmp_path: Path) -> None:
    sizes = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2}
    config = small_run(
        files,
        "groups",
        model={"checkpoint": str(files / "moe")},
        parallel={**sizes, "expert_tensor_parallel_size": 2},
        train={"micro_batches": 2},
    )
    run_ranks(_write_groups, tmp_path, world_size=8)
    for row in plan_run(config, 8)["groups"]:
        found = json.loads((tmp_path / f"{row['rank']}.json").read_text())
        assert {axis: row[axis] for axis in found} == found


def _write_groups(rank: int, world_size: int, results: Path) -> None:
    world = World(rank, world_size, rank, world_size)
    with process_groups(world, CPU, 2, 60.0, tp_size=2, etp_size=2, pp_size=2) as meshes:
        groups = {axis: meshes.dense[axis].get_group() for axis in ("pp", "dp", "tp")}
        groups |= {axis: meshes.experts[axis].get_group() for axis in ("edp", "ep", "etp")}
        groups |= {"dispatch": meshes.dispatch, "stage": meshes.stage.get_group()}
        found = {axis: dist.get_process_group_ranks(group) for axis, group in groups.items()}
        (results / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()


class SentBytes(TorchDispatchMode):
    """Bytes that go to each other rank, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name == "c10d._allgather_base_":
            self.sent["gather_weights"] += args[1].nbytes
        elif name == "c10d._reduce_scatter_base_":
            self.sent["reduce_gradients"] += args[0].nbytes
        elif name == "_c10d_functional.all_gather_into_tensor":
            self.sent["tensor_parallel"] += args[0].nbytes
        elif name == "_c10d_functional.reduce_scatter_tensor":
            self.sent["tensor_parallel"] += result.nbytes
        elif name == "c10d.send":
            self.sent["pipeline"] += args[0][0].nbytes
        return result


# Ranks of a pair, so that what goes to each other rank is all that leaves.
PAIRS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2 in parts": {"train": {"micro_batches": 2}},
    "dp2, weights gathered again, bfloat16": {
        "parallel": {"reshard_after_forward": True},
        "train": {"dtype": "bfloat16"},
    },
    "tp2": {"parallel": {"tensor_parallel_size": 2}},
    "tp2, selective": {"parallel": {"tensor_parallel_size": 2}, "train": {"recompute": "selective"}},
    "tp2, full": {"parallel": {"tensor_parallel_size": 2}, "train": {"recompute": "full"}},
    "pp2": {"parallel": {"pipeline_parallel_size": 2}, "train": {"micro_batches": 4}},
    "tp2, some frozen": {
        "parallel": {"tensor_parallel_size": 2},
        "train": {"freeze": ["embed.weight", "layers.0.*", "layers.1.attention.w_?.weight", "*norm.weight"]},
    },
    "dp2, some frozen, bfloat16": {
        "parallel": {"reshard_after_forward": True},
        "train": {"freeze": ["layers.0.*", "layers.1.attention.*", "*w_down*"], "dtype": "bfloat16"},
    },
}


@pytest.mark.parametrize("kind", ["moe", "dense-engine"])
@pytest.mark.parametrize("name", PAIRS)
def test_dense_traffic_is_that_of_a_step(name: str, kind: str, files: Path, tmp_path: Path) -> None:
    config = small_run(files, "pair", model={"checkpoint": str(files / kind)}, **PAIRS[name])
    run_ranks(_count_bytes, config, tmp_path, world_size=2)
    plan = plan_run(config, 2)
    for rank, kinds in enumerate(plan["traffic"]["dense_of_ranks"]):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {kind: tiers["node"] for kind, tiers in kinds.items() if tiers["node"]} == found["sent"]
        assert plan["memory"]["ranks"][rank]["bytes"]["moments"] == found["moments"]


def _count_bytes(rank: int, world_size: int, config: RunConfig, results: Path) -> None:
    run = replace(resolve(config, world_size, overwrite=True), checkpoint=None)
    dist.barrier()
    sizes = {"tp_size": config.parallel.tensor_parallel_size, "pp_size": config.parallel.pipeline_parallel_size}
    with process_groups(World(rank, world_size, rank, world_size), CPU, 1, 60.0, **sizes) as meshes:
        trainer = Trainer(run, meshes, CPU)
        trainer.one_step()
        with SentBytes() as bytes_of:
            trainer.one_step()
        moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        local = [one.to_local() if isinstance(one, DTensor) else one for one in moments]
        found = {"sent": bytes_of.sent, "moments": sum(one.nbytes for one in local)}
        (results / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
