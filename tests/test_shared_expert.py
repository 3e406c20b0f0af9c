"""What stands beside experts, and layers without them: transformers' Qwen2-MoE, and one process in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.qwen2_moe import engine_views, model_config
from checkpoint_tools.source import open_source
from ep_engine.config import RunConfig
from ep_engine.entries import Shard, expected_entries
from ep_engine.initial import initialise
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.parallelize import entries_of
from ep_engine.whole_model import write_model
from tests.distributed import run_ranks
from tests.run_cases import losses, small_run, train_here, write_text
from tests.small_models import run_tool

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "qkv_bias": False,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CONFIG = model_config(Qwen2MoeConfig(**SIZES))


def oracle() -> Qwen2MoeForCausalLM:
    """The same model in transformers, with random weights."""
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
    return model.float().eval()


def test_logits_and_gradients_are_those_of_transformers() -> None:
    theirs = oracle()
    tensors = engine_views(theirs)
    assert tensors.keys() == expected_entries(CONFIG).keys()
    ours = Decoder(CONFIG)
    for name, shard in entries_of([ours]).items():
        shard.tensor.copy_(tensors[name])
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))
    logits = [ours(tokens), theirs(tokens).logits]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(logits[0])
    for each in logits:
        each.backward(grad)
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for i, moe in ours.moe_layers().items():
        mlp: Any = theirs.model.layers[i].mlp
        assert moe.shared is not None
        assert moe.shared_gate is not None
        pairs |= {
            f"{i} gate": (moe.shared_gate.weight.grad, mlp.shared_expert_gate.weight.grad),
            f"{i} up": (moe.shared.w_up.weight.grad, mlp.shared_expert.up_proj.weight.grad),
            f"{i} down": (moe.shared.w_down.weight.grad, mlp.shared_expert.down_proj.weight.grad),
            f"{i} router": (moe.router.w_in.grad, mlp.gate.weight.grad),
        }
    for name, (found, expected) in pairs.items():
        assert found is not None
        assert expected is not None
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_parallel_size": 2}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "tp2 dp2 ep4": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
    "tp2 pp2 zbv": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}),
}


# All that a layer may have: no experts in the first, norms of queries and keys, a window, residual experts.
MIXED = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    attention_bias="qkv",
    qk_norm="head",
    sliding_window=5,
    initializer_range=0.2,
    moe=MoEConfig(
        num_experts=8,
        top_k=3,
        expert_hidden_size=16,
        gate="mlp_gelu",
        gate_hidden_size=10,
        gate_noise=True,
        score="softmax",
        score_scale=1.5,
        learned_scale=True,
        residual_experts=2,
        residual_hidden_size=12,
        residual_scale=2.0,
        residual_weighting=True,
    ),
    dense_layers={0: 40},
)


# A condensed layer whose gate and factors end within what a rank of tp2 has, and one without FFN.
CONDENSED = ModelConfig.model_validate(
    {
        **MIXED.model_dump(),
        "dense_layers": {0: 40, 1: 48, 3: 0},
        "condensed": {1: {"shared_size": 20, "gated": True, "scales": [0.3, 0.7]}, 3: {}},
    }
)


@pytest.fixture(scope="module", params=["qwen2_moe", "mixed", "condensed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files and the model as an engine checkpoint."""
    folder = write_text(tmp_path_factory.mktemp(request.param))
    if request.param == "qwen2_moe":
        write_model(folder / "model", CONFIG, engine_views(oracle()))
    else:
        config = MIXED if request.param == "mixed" else CONDENSED
        tensors = {name: torch.empty(shape) for name, shape in expected_entries(config).items()}
        initialise({name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}, config, seed=0)
        write_model(folder / "model", config, tensors)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> RunConfig:
    """The run of one process."""
    config = run_config(folder, "one")
    train_here(config)
    return config


def run_config(folder: Path, name: str, **parallel: Any) -> RunConfig:
    train = {"steps": 10, "micro_batches": 2, "learning_rate": 1e-3}
    return small_run(folder, name, model={"checkpoint": str(folder / "model")}, train=train, parallel=parallel)


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_run_of_one_process(name: str, folder: Path, single: RunConfig) -> None:
    world_size, parallel = LAYOUTS[name]
    config = run_config(folder, name.replace(" ", "-"), **parallel)
    run_ranks(_train, config, world_size=world_size)
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)
    one, many = (open_source(c.output.folder / "checkpoints/step_000010").tensors for c in (single, config))
    for weight, tensor in one.items():
        # Adam divides by the root of tiny second moments, which enlarges the last bits of a gradient.
        torch.testing.assert_close(many[weight], tensor, rtol=1e-3, atol=1e-4)


def test_what_has_no_part_in_training_stays(folder: Path, single: RunConfig) -> None:
    before = open_source(folder / "model").tensors
    after = open_source(single.output.folder / "checkpoints/step_000010").tensors
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert same == {name for name in before if name.endswith("w_noise")}


def test_a_family_without_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config, sentence in (
        (CONFIG, "LlamaMoEForCausalLM cannot express moe.score 'softmax' of the model, it would be read as"),
        (
            MIXED,
            "LlamaMoEResidualForCausalLM cannot express the model (its config.json: add_weight_norm is True, the ",
        ),
    ):
        tensors = {name: torch.zeros(shape) for name, shape in expected_entries(config).items()}
        write_model(tmp_path / "model", config, tensors, overwrite=True)
        assert run_tool("export", tmp_path / "model", tmp_path / "hf") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()
