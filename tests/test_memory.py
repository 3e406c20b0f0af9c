"""The memory of a rank: weights and activations by hand, what autograd keeps, and what a step takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import LAYOUTS, MODEL, compared, config_of, make_files, measure
from ep_engine.attention import Positions
from ep_engine.config import RunConfig
from ep_engine.model import DecoderLayer
from ep_engine.model_config import CondensedLayer, ModelConfig, MoEConfig
from ep_engine.planning.activations import Part
from ep_engine.planning.expert_traffic import Groups, Passed
from ep_engine.planning.memory import Step, Tape
from ep_engine.planning.plan_run import plan_run
from ep_engine.planning.weight_groups import Weights, stage_weights
from ep_engine.resolve import resolve_layout
from tests.distributed import run_ranks

DENSE = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
MOE = DENSE.model_copy(update={"moe": MoEConfig(num_experts=8, top_k=2, expert_hidden_size=24)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for name, model in (("dense", DENSE), ("moe", MOE)):
        make_files(folder / name, model, num_tokens=9000)
    make_files(folder / "large")
    return folder


def small(folder: Path, kind: str, **sections: dict[str, Any]) -> RunConfig:
    return config_of(folder / kind, sections, sequence_length=16)


def test_shares_of_uneven_weights_are_as_large_as_the_largest() -> None:
    # rows 0-1, 2-3 and 4 on three ranks; a vector of 2 on the first two
    groups = [Weights(((5, 4), (2,)), "dp", 3, position, 2, False) for position in range(3)]
    assert [group.gathered for group in groups] == [6 * 4 + 3] * 3
    assert [group.share for group in groups] == [2 * 4 + 1] * 3
    assert [group.own for group in groups] == [9, 9, 4]
    assert groups[0].largest == 20


def test_weights_of_a_layer_are_grouped_as_they_are_wrapped(folder: Path) -> None:
    parallel = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
    config = small(folder, "moe", parallel=parallel, train={"dtype": "bfloat16"})
    layout = resolve_layout(config, 4, config.model.checkpoint)
    weights = stage_weights(config, layout.model, layout.placement, Groups.of(config, 4, 4), 1, range(4))
    attention, *norms, router, experts = weights.layers[0]
    assert attention.shapes == ((16, 32), (8, 32), (8, 32), (32, 16))
    assert (attention.axis, attention.ranks, attention.itemsize) == ("dp", 2, 2)
    assert [(norm.shapes, norm.axis, norm.ranks) for norm in norms] == [(((32,),), "stage", 4)] * 2
    assert (router.shapes, router.axis, router.itemsize) == (((8, 32), (8, 8)), "stage", 4)
    assert (experts.shapes, experts.axis, experts.ranks) == (((4, 48, 32), (4, 32, 24)), "edp", 2)
    assert weights.root.shapes == ((32, 32), (32, 32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["plain", "separate", "qk_norm head", "qk_norm all", "window", "gated", "scaled", "no ffn"]
)
def test_a_dense_layer_keeps_what_autograd_saves(dtype: str, kind: str, folder: Path) -> None:
    separate = kind == "separate"
    config = small(folder, "dense", train={"dtype": dtype}, data={"separate_documents": separate})
    rows, length = config.data.batch_size, config.data.sequence_length
    norm = kind.removeprefix("qk_norm ") if kind.startswith("qk_norm") else None
    model = DENSE.model_copy(update={"qk_norm": norm, "sliding_window": 5 if kind == "window" else None})
    condensed = {"gated": CondensedLayer(shared_size=10, gated=True), "scaled": CondensedLayer(scales=[0.1, 0.2]),
                 "no ffn": CondensedLayer()}  # fmt: skip
    if kind in condensed:
        width = 0 if kind == "no ffn" else 48
        model = model.model_copy(update={"dense_layers": {0: width}, "condensed": {0: condensed[kind]}})
    layer = DecoderLayer(model, 0, Positions(model)).to(getattr(torch, dtype))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(rows, length, 32, dtype=getattr(torch, dtype), requires_grad=True)
    apart = torch.ones(rows, 1, length, length, dtype=torch.bool).tril() if separate else None
    known = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    known |= {table.untyped_storage()._cdata for table in layer.attention.positions.table(length, x.device)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, apart)
    found = sum(storage.nbytes() for key, storage in saved.items() if key not in known)
    assert Part(config, model, 1).layer(0, None).total == found


def test_a_layer_of_experts_by_hand(folder: Path) -> None:
    config = small(folder, "moe", parallel={"expert_parallel_size": 2})
    part = Part(config, MOE, 2)  # 4 rows of 16 tokens
    kept = part.layer(0, Passed(rows=70, copies=90, sent=30, width=2))
    hidden = 64 * 32 * 4
    assert kept.residual == 2 * hidden
    assert (
        kept.attention == hidden + 64 * 4 + hidden + 64 * (32 + 16 + 16 + 32 + 4) * 4
    )  # norm, its root, input, qkv, sums
    assert kept.rows == 70 * (32 * 4 + 2 * 2 * 4)
    assert kept.gate_up == 90 * 2 * 24 * 4
    # norm and root; what the router reads; logits, tanh, softmax; ids and weights; a plan of two rows; tables
    tables = 64 * 2 * 7 * 4 + 70 * 2 * (4 + 4 + 4 + 4)
    assert kept.ffn == hidden + 64 * 4 + hidden + 64 * 3 * 8 * 4 + 64 * 2 * (8 + 4) + tables


def test_the_tape_remembers_the_fullest_moment() -> None:
    tape = Tape()
    tape.hold("one", weights=5)
    tape.touch("two", buffer=3)
    tape.hold("three", rows=2)
    assert (tape.peak.total(), tape.when, tape.now.total()) == (8, "two", 7)
    assert tape.peak == {"weights": 5, "buffer": 3}


@pytest.mark.parametrize("kind", ["moe", "dense"])
@pytest.mark.parametrize("name", [*LAYOUTS, "pp4 zbv", "tp2 pp2 interleaved, again"])
def test_nothing_stays_of_a_step_but_its_gradients(name: str, kind: str, folder: Path) -> None:
    more: dict[str, tuple[int, dict[str, Any]]] = {
        "pp4 zbv": (8, {"parallel": {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}}),
        "tp2 pp2 interleaved, again": (
            4,
            {
                "parallel": {
                    "pipeline_parallel_size": 2,
                    "tensor_parallel_size": 2,
                    "pipeline_schedule": "interleaved",
                    "reshard_after_forward": True,
                },
                "train": {"micro_batches": 4, "recompute": "selective"},
            },
        ),
    }
    world_size, sections = (LAYOUTS | more)[name]
    if kind == "dense":
        sections = {section: values for section, values in sections.items() if section != "moe"}
        parallel = sections.get("parallel", {}) | {"expert_parallel_size": 1}
        sections = sections | {"parallel": parallel}
    config = small(folder, kind, **sections)
    layout = resolve_layout(config, world_size, config.model.checkpoint)
    groups = Groups.of(config, world_size, world_size)
    passed = dict.fromkeys(
        ((rank, layer, part) for rank in range(8) for layer in range(4) for part in range(4)), Passed(40, 50, 10, 2)
    )
    for rank in range(world_size):
        step = Step(config, layout.model, layout.stages, layout.placement, groups, rank, passed)
        tape = step.walk()
        weights = [group for of_stage in step.weights.values() for group in of_stage.all()]
        expected = {
            "parameters": 4 * sum(group.share for group in weights),
            "gradients": 4 * sum(group.share for group in weights),
            "moments": 8 * sum(group.own for group in weights),
        }
        left = {key: size for key, size in tape.now.items() if size and key != "pipeline"}
        assert left == expected
        assert min(tape.peak.values()) >= 0


def test_more_parts_in_flight_take_more(folder: Path) -> None:
    def activations(schedule: str) -> int:
        parallel = {"pipeline_parallel_size": 2, "pipeline_schedule": schedule}
        config = small(folder, "dense", parallel=parallel, train={"micro_batches": 8})
        return int(plan_run(config, 2)["memory"]["ranks"][0]["bytes"]["activations"])

    assert activations("gpipe") > 3 * activations("1f1b") > 0


def test_an_arena_of_cuda_ipc_has_room_for_the_worst_case(folder: Path) -> None:
    parallel = {"expert_parallel_size": 2, "device": "cuda"}
    config = small(folder, "moe", parallel=parallel, moe={"transport": "cuda_ipc"})
    tokens, message = 8 * 16 // 2, 32 * 4 + 2 * 2 * 4
    assert plan_run(config, 2)["memory"]["ranks"][0]["bytes"]["transport"] == 2 * 2 * tokens * message


def _check(folder: Path, sections: dict[str, dict[str, Any]], world_size: int, results: Path, **data: int) -> None:
    config = config_of(folder, sections, **data)
    run_ranks(measure, config, results, world_size=world_size, timeout_s=300)
    for row in compared(config, world_size, results):
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.15), json.dumps(row)


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (1, {"train": {"dtype": "bfloat16", "recompute": "selective"}}),
        (2, {"parallel": {"pipeline_parallel_size": 2}, "train": {"micro_batches": 4}}),
        (2, {"parallel": {"tensor_parallel_size": 2, "expert_parallel_size": 2}}),
    ],
)
def test_a_small_step_takes_what_is_predicted(
    world_size: int, sections: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Hardly any weights here, so this is about activations."""
    _check(folder / "moe", sections, world_size, tmp_path, batch_size=16, sequence_length=64)


@pytest.mark.parametrize("reshard", [False, True])
def test_slices_of_experts_take_what_is_predicted(reshard: bool, tmp_path: Path) -> None:
    """Two experts on each of four ranks: nearly all weights, in slices, which FSDP2 copies once more."""
    moe = MoEConfig(num_experts=2, top_k=1, expert_hidden_size=2048)
    make_files(tmp_path / "few", MODEL.model_copy(update={"moe": moe, "num_layers": 2, "vocab_size": 512}))
    parallel = {"parallel": {"reshard_after_forward": reshard}}
    _check(tmp_path / "few", parallel, 4, tmp_path, batch_size=4, sequence_length=32)


def test_frozen_experts_take_what_is_predicted(tmp_path: Path) -> None:
    """Nearly all weights are experts, which have neither gradients nor moments."""
    moe = MoEConfig(num_experts=4, top_k=1, expert_hidden_size=2048)
    make_files(tmp_path / "few", MODEL.model_copy(update={"moe": moe, "num_layers": 2, "vocab_size": 512}))
    frozen = {"train": {"freeze": ["*.experts.*"], "micro_batches": 2}}
    _check(tmp_path / "few", frozen, 1, tmp_path, batch_size=4, sequence_length=32)


# benchmarks/memory.py has them all; of each way to share or to keep less, one.
SOME = [
    "bfloat16", "recompute full", "dp2, again, bfloat16, 4 parts", "ep2 shared_memory", "ep2 fixed rows, full",
    "tp2 ep2 bfloat16", "pp2 gpipe", "pp2 interleaved", "pp2 zbv",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_step_of_29_million_parameters_takes_what_is_predicted(name: str, folder: Path, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[name]
    _check(folder / "large", sections, world_size, tmp_path)
