"""Pipelines: the run of one process under every schedule, nothing computed or sent twice, and the same bits again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.source import open_source
from ep_engine.checkpoint import read_manifest
from ep_engine.collaboration import read_profile
from ep_engine.config import RunConfig
from ep_engine.stages import Stages
from tests.distributed import run_ranks
from tests.run_cases import losses, small_run, train_here, write_text
from tests.small_models import dense_folder, moe_checkpoint, run_tool

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
    config = small_run(
        folder,
        name.replace(" ", "-").replace(",", ""),
        model=parallel.pop("model", {"checkpoint": str(folder / "moe")}),
        train={"steps": 10, "micro_batches": PARTS, **train},
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
