"""EP_DEBUG=1 finds the first thing that two ranks have differently, on every rank, and nothing where all is well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ep_engine.config import RunConfig
from ep_engine.errors import Fault
from ep_engine.mesh import World, process_groups
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.run_cases import small_run, write_text
from tests.small_models import dense_folder, moe_checkpoint, run_tool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a MoE model, and a dense one whose biases and head lie on several ranks."""
    folder = write_text(tmp_path_factory.mktemp("agreement"))
    moe_checkpoint(folder / "moe", dense_folder(folder / "dense"))
    biased = dense_folder(folder / "biased", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert run_tool("convert", biased, folder / "biased-engine") == 0
    return folder


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spoil_bias(trainer: Trainer) -> None:
    local(trainer.stages[0].decoder_layers()[0].ffn.w_down.bias).add_(1e-6)


def spoil_head(trainer: Trainer) -> None:
    embed = trainer.stages[0].embed
    assert embed is not None
    local(embed.weight)[3, 4] += 1e-6


def spoil_moment(trainer: Trainer) -> None:
    weight = trainer.stages[0].decoder_layers()[1].ffn.w_down.bias
    local(trainer.optimizer.state[weight]["exp_avg"]).mul_(1.01)


def spoil_rule(trainer: Trainer) -> None:
    rule = trainer.stages[0].moe_layers()[1].router.rule
    rule._on[CPU] = rule.on(CPU)._replace(bias_E=torch.linspace(1, -1, 8))


def spoil_text(trainer: Trainer) -> None:
    trainer.feed.blend._order["seed"] += 1


def nothing(_: Trainer) -> None:
    pass


CASES: dict[str, tuple[str, dict[str, Any], int, Callable[[Trainer], None], str]] = {
    "a bias": (
        "biased-engine",
        {"tensor_parallel_size": 2},
        2,
        spoil_bias,
        r"^step 1: layers\.0\.ffn\.w_down\.bias from element 0 on, \(32,\) differs between ranks 0 and 1 \(checksums ",
    ),
    "the head that is the embedding": (
        "biased-engine",
        {"pipeline_parallel_size": 2},
        2,
        spoil_head,
        r"^step 1: embed\.weight from element 0 on, \(64, 32\) differs between ranks 0 and 1",
    ),
    "a moment": (
        "biased-engine",
        {"tensor_parallel_size": 2},
        2,
        spoil_moment,
        r"^step 1: exp_avg/layers\.1\.ffn\.w_down\.bias from element 0 on, \(32,\) differs between ranks 0 and 1",
    ),
    "the text": (
        "moe",
        {"tensor_parallel_size": 2},
        4,
        spoil_text,
        r"^step 1: the rows of data-parallel index 1 differs between ranks 2 and 3",
    ),
    "a rule": (
        "moe",
        {"expert_parallel_size": 2},
        2,
        spoil_rule,
        r"^step 1: the routing of layer 1 differs between ranks 0 and 1",
    ),
    "nothing": ("moe", {"tensor_parallel_size": 2, "expert_parallel_size": 2}, 4, nothing, ""),
    "nothing in bfloat16": ("moe", {"expert_parallel_size": 2, "pipeline_parallel_size": 2}, 4, nothing, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_difference_is_named_on_every_rank(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_DEBUG", "1")
    model, parallel, world_size, _, _ = CASES[name]
    train = {"micro_batches": 2, "dtype": "bfloat16" if "bfloat16" in name else "float32"}
    sections = {"model": {"checkpoint": str(folder / model)}, "parallel": parallel, "train": train}
    config = small_run(folder, name.replace(" ", "-"), **sections)
    run_ranks(_spoil_and_check, config, name, world_size=world_size)


def _spoil_and_check(rank: int, world_size: int, config: RunConfig, name: str) -> None:
    *_, spoil, sentence = CASES[name]
    run = resolve(config, world_size)
    parallel = config.parallel
    groups = process_groups(
        World(rank=rank, size=world_size),
        CPU,
        parallel.expert_parallel_size,
        60.0,
        tp_size=parallel.tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
    )
    with groups as meshes:
        trainer = Trainer(run, meshes, CPU)
        trainer.one_step()
        trainer.check_agreement()
        if rank == world_size - 1:
            with torch.no_grad():
                spoil(trainer)
        dist.barrier()
        if not sentence:
            trainer.one_step()
            trainer.check_agreement()
            return
        with pytest.raises(Fault, match=sentence) as caught:
            trainer.check_agreement()
        assert caught.value.everywhere
