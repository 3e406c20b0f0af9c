"""Pipelines: the run of one process under every schedule, nothing computed or sent twice, and the same bits again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_tools.source import open_source
from ep_engine.c2r.collaboration import read_profile
from ep_engine.checkpoint import read_manifest
from ep_engine.config import RunConfig
from ep_engine.data.tokens import write_token_file
from ep_engine.mesh import World, process_groups
from ep_engine.resolve import resolve
from ep_engine.stages import Schedule, Stages
from ep_engine.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.run_cases import losses, small_run, train_here, write_text
from tests.small_models import dense_folder, moe_checkpoint

CPU = torch.device("cpu")
LAYERS = 5
PARTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files and a MoE model with an odd number of layers."""
    folder = write_text(tmp_path_factory.mktemp("pipelines"))
    moe_checkpoint(folder / "moe", dense_folder(folder / "dense", initializer_range=0.05, num_hidden_layers=LAYERS))
    return folder


def run(folder: Path, name: str, world_size: int, **parallel: Any) -> RunConfig:
    """Ten steps in a layout; `train.` keys by their names."""
    train = {key: parallel.pop(key) for key in ("steps", "recompute", "dtype", "save_every") if key in parallel}
    resume = parallel.pop("resume", False)
    data = parallel.pop("data", {})
    config = small_run(
        folder,
        name.replace(" ", "-").replace(",", ""),
        model=parallel.pop("model", {"checkpoint": str(folder / "moe")}),
        train={"steps": 10, "micro_batches": PARTS, **train},
        data=data,
        parallel=parallel,
        output={"resume": resume},
    )
    run_ranks(_train, config, world_size=world_size)
    return config


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.fixture(scope="module")
def single(folder: Path) -> RunConfig:
    """The run of one process."""
    return run(folder, "one", 1)


PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2 gpipe": (2, {"pipeline_schedule": "gpipe"}),
    "pp2 1f1b": (2, {}),
    "pp2 1f1b, uneven": (2, {"pipeline_layers": [1, 4]}),
    "pp2 interleaved": (2, {"pipeline_schedule": "interleaved"}),
    "pp2 zbv": (2, {"pipeline_schedule": "zbv", "pipeline_layers": [1, 1, 2, 1]}),
    "pp4 1f1b": (4, {"pipeline_parallel_size": 4}),
    "pp2 dp2, weights gathered again": (4, {"reshard_after_forward": True}),
    "pp2 ep2": (4, {"expert_parallel_size": 2}),
    "pp2 ep2 zbv": (4, {"expert_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "pp2 etp2 interleaved": (4, {"expert_tensor_parallel_size": 2, "pipeline_schedule": "interleaved"}),
    "pp2 tp2 zbv": (4, {"tensor_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "pp2 tp2 ep2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "pp2 dp2 tp2 ep4 interleaved": (
        8,
        {"tensor_parallel_size": 2, "expert_parallel_size": 4, "pipeline_schedule": "interleaved"},
    ),
    "pp2 ep2, computed again": (4, {"expert_parallel_size": 2, "recompute": "full"}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_schedule_gives_the_run_of_one_process(name: str, folder: Path, single: RunConfig) -> None:
    world_size, parallel = PIPELINES[name]
    config = run(folder, name, world_size, **{"pipeline_parallel_size": 2, **parallel})
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)
    one, many = (open_source(c.output.folder / "checkpoints/step_000010").tensors for c in (single, config))
    assert one.keys() == many.keys()
    for weight, tensor in one.items():
        # Adam divides by the root of tiny second moments, which enlarges the last bits of a gradient.
        torch.testing.assert_close(many[weight], tensor, rtol=1e-3, atol=1e-4)
    first, second = (json.loads((c.output.folder / "summary.json").read_text()) for c in (single, config))
    assert second["heldout_loss"] == pytest.approx(first["heldout_loss"], rel=1e-5)
    assert second["heldout_tokens"] == first["heldout_tokens"]
    assert second["changed_share"] == first["changed_share"]
    assert second["load_max_over_mean"] == first["load_max_over_mean"]
    profiles = [read_profile(c.output.folder / "profile.npz") for c in (single, config)]
    assert (profiles[0].counts == profiles[1].counts).all()
    assert len(second["ledger"]["layers"]) == LAYERS


class OpCounts(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def _count(rank: int, world_size: int, config: RunConfig, results: Path) -> None:
    run = resolve(config, world_size)
    dist.barrier()
    with process_groups(World(rank=rank, size=world_size), CPU, 2, 60.0, pp_size=2) as meshes:
        trainer = Trainer(run, meshes, CPU)
        trainer.one_step()  # torch makes its buffers
        trainer.ledger.reset()
        with OpCounts() as ops:
            trainer.one_step()
        ledger = trainer.ledger.to_json()["layers"]
        (results / f"{rank}.json").write_text(json.dumps({"ops": ops.counts, "layers": ledger}))


def count_step(folder: Path, schedule: str, results: Path) -> tuple[Counter[str], list[Any]]:
    """Operators of all ranks in one step on pp2 x ep2, and what the ledgers of one expert-parallel group say."""
    results.mkdir()
    parallel = {"pipeline_parallel_size": 2, "pipeline_schedule": schedule, "expert_parallel_size": 2}
    config = small_run(
        folder,
        f"count-{schedule}",
        model={"checkpoint": str(folder / "moe")},
        train={"steps": 10, "micro_batches": PARTS},
        parallel=parallel,
        moe={"transport": "collective"},
    )
    run_ranks(_count, config, results, world_size=4)
    found = [json.loads((results / f"{rank}.json").read_text()) for rank in range(4)]
    return sum((Counter(one["ops"]) for one in found), Counter()), [one["layers"] for one in found]


def test_no_schedule_runs_an_all_to_all_or_a_product_twice(folder: Path, tmp_path: Path) -> None:
    passes = LAYERS * PARTS * 2  # of a MoE layer on a rank of its group
    plain: Counter[str] = Counter()
    for schedule in get_args(Schedule):
        ops, layers = count_step(folder, schedule, tmp_path / schedule)
        assert ops["c10d.alltoall_base_"] == 5 * passes  # counts, dispatch, combine, and the backwards of the two
        assert ops["ep_engine.experts_forward"] == passes
        assert ops["ep_engine.experts_backward"] == passes
        # Later, where the schedule has idle time.
        assert ops["ep_engine.experts_weight_grads"] == (passes if schedule == "zbv" else 0)
        tokens = [layer["tokens"] for rank in layers for layer in rank]
        assert sum(tokens) == LAYERS * 8 * 16  # every token once in every layer
        plain = plain or ops
        for product in (
            "aten.mm",
            "aten.addmm",
            "aten.bmm",
            "ep_engine.linear_rows",
            "ep_engine.choose_experts_backward",
        ):
            assert ops[product] == plain[product], (schedule, product)


NEW = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": LAYERS,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
}
DENSE: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "untied, zbv": (2, {}, {"pipeline_schedule": "zbv"}),
    "head is the embedding": (2, {"tie_embeddings": True}, {}),
    "head is the embedding, interleaved, tp2 dp2": (
        8,
        {"tie_embeddings": True},
        {"tensor_parallel_size": 2, "pipeline_schedule": "interleaved"},
    ),
    "head is the embedding, pp4": (4, {"tie_embeddings": True}, {"pipeline_parallel_size": 4}),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_is_that_of_one_process(name: str, folder: Path) -> None:
    world_size, model, parallel = DENSE[name]
    one, many = (
        run(folder, f"dense {name} {size}", size, model=NEW | model, **layout)
        for size, layout in ((1, {}), (world_size, {"pipeline_parallel_size": 2, **parallel}))
    )
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    norms = [[json.loads(line)["grad_norm"] for line in _lines(config)] for config in (one, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    first, second = (open_source(c.output.folder / "checkpoints/step_000010").tensors for c in (one, many))
    assert first.keys() == second.keys()
    for weight, tensor in first.items():
        torch.testing.assert_close(second[weight], tensor, rtol=1e-3, atol=1e-4)  # as above


def _lines(config: RunConfig) -> list[str]:
    return (config.output.folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_a_run_repeated_or_resumed_has_the_same_bits(schedule: str, folder: Path) -> None:
    layout = {"pipeline_parallel_size": 2, "pipeline_schedule": schedule, "expert_parallel_size": 2}

    def repeat(which: str, *, resume: bool = False) -> tuple[list[float], dict[str, str]]:
        config = run(folder, f"{schedule} {which}", 4, steps=6, save_every=3, resume=resume, **layout)
        return losses(config), read_manifest(config.output.folder / "checkpoints/step_000006")["checksums"]

    whole = repeat("whole")
    assert repeat("again") == whole
    (folder / f"{schedule}-again/checkpoints/step_000006").rename(folder / f"{schedule}-forgotten")
    assert repeat("again", resume=True) == whole  # three steps from the first run, three from the second


MOVES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "from 1f1b to zbv with ep2": [
        (2, {"pipeline_parallel_size": 2}),
        (4, {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv", "expert_parallel_size": 2}),
    ],
    "from tp2 ep2 to pp4": [
        (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
        (4, {"pipeline_parallel_size": 4}),
    ],
    "from pp2 etp2 to one process": [(4, {"pipeline_parallel_size": 2, "expert_tensor_parallel_size": 2}), (1, {})],
}


@pytest.mark.parametrize("name", MOVES)
def test_resuming_in_another_layout_goes_on_with_the_same_losses(name: str, folder: Path, single: RunConfig) -> None:
    stem = name.replace(" ", "-")
    for i, (world_size, layout) in enumerate(MOVES[name]):
        config = run(folder, stem, world_size, save_every=5, resume=i == 1, **layout)
        if i == 0:
            (folder / stem / "checkpoints/step_000010").rename(folder / f"{stem}-away")
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)


SEPARATE: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel_size": 2, "recompute": "full"}),
    "pp2 1f1b": (2, {"pipeline_parallel_size": 2, "recompute": "selective"}),
    "pp2 tp2 zbv": (4, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "pipeline_schedule": "zbv"}),
}


def test_documents_stay_apart_in_every_layout(folder: Path) -> None:
    steps = np.random.default_rng(0).integers(-2, 4, (500, 8))
    write_token_file(folder / "documents", list(np.cumsum(steps, axis=1) % 64), 64)
    data = {"train": str(folder / "documents"), "heldout": str(folder / "documents")}
    joined = run(folder, "joined", 1, data=data)
    apart = run(folder, "apart", 1, data=data | {"separate_documents": True})
    assert losses(apart) != pytest.approx(losses(joined), rel=1e-4)
    for name, (world_size, layout) in SEPARATE.items():
        config = run(folder, f"apart {name}", world_size, data=data | {"separate_documents": True}, **layout)
        assert losses(config) == pytest.approx(losses(apart), rel=1e-5), name
        kept = [json.loads((c.output.folder / "summary.json").read_text())["heldout_loss"] for c in (apart, config)]
        assert kept[1] == pytest.approx(kept[0], rel=1e-5), name


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_bfloat16_stays_near_float32(schedule: str, folder: Path, single: RunConfig) -> None:
    layout = {"pipeline_parallel_size": 2, "pipeline_schedule": schedule, "expert_parallel_size": 2}
    config = run(folder, f"bf16 {schedule}", 4, dtype="bfloat16", **layout)
    assert losses(config) == pytest.approx(losses(single), rel=0.02)  # bfloat16 keeps 8 bits
    tensors = open_source(config.output.folder / "checkpoints/step_000010").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_layers_are_spread_evenly_with_the_longer_stages_first() -> None:
    assert Stages.of(5, 2, "1f1b").layers == (range(3), range(3, 5))
    assert Stages.of(5, 2, "zbv").rank_of_stage == (0, 1, 1, 0)
    assert Stages.of(8, 2, "interleaved", [1, 1, 1, 1, 2, 2]).rank_of_stage == (0, 1, 0, 1, 0, 1)
    stages = Stages.of(9, 3, "zbv")
    assert [stages.on(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert [i for layers in stages.layers for i in layers] == list(range(9))
