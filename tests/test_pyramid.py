"""Pyramids: models whose layers have different numbers of experts (arXiv:2201.05596), all along their way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint_tools.source import open_source
from checkpoint_tools.upcycle import UpcycleOptions, moe_config
from ep_engine import checkpoint
from ep_engine.c2r.collaboration import read_profile
from ep_engine.config import RunConfig, to_toml
from ep_engine.errors import UserError
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig, read_model_config
from ep_engine.parallelize import entries_of
from ep_engine.placement import Placement, read_placement
from ep_engine.resolve import resolve
from tests.distributed import run_ranks
from tests.run_cases import losses, small_run, train_here, write_text
from tests.small_models import dense_folder, run_tool

EACH = "0,2,4,6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a dense model of 4 layers, and its pyramid in `moe`."""
    folder = write_text(tmp_path_factory.mktemp("pyramid"))
    dense_folder(folder / "dense", num_hidden_layers=4, initializer_range=0.05)
    run_tool("upcycle", folder / "dense", folder / "moe", "--experts-per-layer", EACH, "--top-k", 2, "--noise", 0.1)
    return folder


@pytest.mark.parametrize(
    "options",
    [("--gate", "linear"), ("--gate", "mlp"), ("--granularity", 2), ("--score", "softmax", "--gate-init", "zero")],
    ids=str,
)
def test_an_upcycled_pyramid_computes_the_same_at_first(options: tuple[Any, ...], folder: Path, tmp_path: Path) -> None:
    sizes = ("--experts-per-layer", EACH, "--top-k", 2, *options)
    assert run_tool("upcycle", folder / "dense", tmp_path / "moe", *sizes) == 0
    config = open_source(tmp_path / "moe").config
    assert (config.moe_layers(), config.experts_of_layer(), config.dense_layers) == ([1, 2, 3], [2, 4, 6], {0: 48})
    assert run_tool("verify", folder / "dense", tmp_path / "moe", "--logits") == 0


def test_a_pyramid_goes_to_llama_moe_and_back(folder: Path, tmp_path: Path) -> None:
    assert run_tool("export", folder / "moe", tmp_path / "hf") == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["num_experts"], [len(row) for row in written["size_experts"]]) == (6, [2, 4, 6])
    assert run_tool("verify", folder / "moe", tmp_path / "hf") == 0
    assert run_tool("convert", tmp_path / "hf", tmp_path / "back") == 0
    assert run_tool("verify", folder / "moe", tmp_path / "back") == 0
    assert_transformers_agrees(folder / "moe", tmp_path / "hf")


def test_a_family_with_one_number_of_experts_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--experts-per-layer", "2,4,4,6", "--top-k", 2)
    assert run_tool("upcycle", folder / "dense", tmp_path / "moe", *sizes) == 0
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf", "--family", "mixtral") == 2
    assert "cannot express moe.experts_of_layer [2, 4, 4, 6] of the model" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def run_of(folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    model = {"checkpoint": str(folder / "moe")}
    return small_run(folder, name, **{"model": model, "train": {"steps": 6, "micro_batches": 2}, **sections})


@pytest.fixture(scope="module")
def single(folder: Path) -> RunConfig:
    """The run of one process."""
    config = run_of(folder, "single")
    train_here(config)
    return config


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep 2": (2, {"expert_parallel_size": 2}),
    "edp 2, ep 2": (4, {"expert_parallel_size": 2}),
    "pp 2, ep 2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "tp 2, ep 2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "etp 2": (2, {"expert_tensor_parallel_size": 2}),
}


def train_on(rank: int, size: int, config: RunConfig) -> None:
    train_here(config, rank, size)


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_run_of_one_process(name: str, folder: Path, single: RunConfig) -> None:
    world_size, parallel = LAYOUTS[name]
    config = run_of(folder, name, parallel={"device": "cpu", **parallel})
    run_ranks(train_on, config, world_size=world_size)
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)  # sums of ranks are added in another order
    for found, wanted in zip(lines_of(config), lines_of(single), strict=True):
        assert found["load_max_over_mean"] == pytest.approx(wanted["load_max_over_mean"])
    counted, alone = (read_profile(c.output.folder / "profile.npz") for c in (config, single))
    assert counted.experts_of_layer == [2, 4, 6]
    np.testing.assert_array_equal(counted.counts, alone.counts)


def test_it_is_profiled_placed_constrained_planned_and_simulated(run: Any, folder: Path, tmp_path: Path) -> None:
    profile, trace, placement = (tmp_path / name for name in ("profile.npz", "trace.npz", "placement.json"))
    tokens = ("--tokens", folder / "train", "--max-tokens", 512, "--sequence-length", 16)
    kept = ("--out", profile, "--trace", trace, "--scores", "--picture", tmp_path / "profile.png")
    assert run("profile", folder / "moe", *tokens, *kept)[0] == 0
    assert read_profile(profile).experts_of_layer == [2, 4, 6]
    for objective in ("pairs", "distinct-devices"):
        given = ("--devices", 2, "--out", placement, "--objective", objective, "--trace", trace, "--check", profile)
        assert run("place", profile, *given, "--overwrite")[0] == 0
    devices = [sorted(read_placement(placement).device_of_expert(layer)) for layer in range(3)]
    assert devices == [[0, 1], [0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]

    placed = {"moe": {"placement": str(placement), "combine": "per_expert"}}
    rule = {"rule": "c2r_grouped", "profile": str(profile), "top_t": 1, "max_devices": 2}
    sections = {**placed, "routing": rule, "parallel": {"device": "cpu", "expert_parallel_size": 2}}
    config = run_of(folder, "constrained", **sections)
    run_ranks(train_on, config, world_size=2)
    trained = config.output.folder / "checkpoints/step_000006"
    assert [len(rows) for rows in open_source(trained).config.moe.routing.lists] == [2, 4, 6]
    assert run_tool("export", trained, tmp_path / "hf") == 0
    assert_transformers_agrees(trained, tmp_path / "hf")

    (tmp_path / "run.toml").write_text(to_toml(config))
    status, out, _ = run("plan", tmp_path / "run.toml", "--ranks", 2, "--trace", trace, "--json")
    assert status == 0
    assert json.loads(out)["traffic"]
    cluster = Path(__file__).parents[1] / "launch/clusters/h200-ib.toml"
    rules = ("--rule", "topk", "--rule", "c2r_grouped:1:2", "--profile", profile)
    overrides = ("data.batch_size=32", "parallel.expert_parallel_size=2")
    simulated = run(
        "simulate", trace, "--run", tmp_path / "run.toml", "--cluster", cluster, *rules, "--json", *overrides
    )
    assert simulated[0] == 0, simulated[2]


def assert_transformers_agrees(checkpoint_folder: Path, hf: Path) -> None:
    """transformers with our modeling file has the engine's logits."""
    model = Decoder(read_model_config(checkpoint_folder / "model.json")).eval()
    checkpoint.load(checkpoint_folder, entries_of([model]))
    tokens = torch.arange(24).view(2, 12) % 60
    theirs = AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        expected, found = model(tokens), theirs(tokens).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("--experts-per-layer", "2,4"): "names 2 layers, 2 with experts, the model has 4; give a number for each",
        ("--experts-per-layer", "0,0,0,0"): "names 4 layers, 0 with experts",
        ("--experts-per-layer", "2,x"): r"--experts-per-layer (2,x) must be numbers with commas between",
        ("--experts-per-layer", "0,1,2,4"): "moe.top_k (2) must be in 1..moe.num_experts (1), the fewest that a layer",
        (
            "--experts-per-layer",
            EACH,
            "--num-experts",
            "4",
        ): "give either --num-experts (4) or --experts-per-layer (0,2,",
        ("--experts-per-layer", EACH, "--start-layer", "1"): "have no effect beside --experts-per-layer",
        ("--experts-per-layer", "0,3,4,6", "--granularity", "2"): "must divide --experts-per-layer (3)",
    }
    for options, text in wrong.items():
        assert run_tool("upcycle", folder / "dense", tmp_path / "moe", "--top-k", 2, *options) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "moe").exists()
    with pytest.raises(UserError, match=r"expert_parallel_size \(4\) is larger than .* number of experts \(2\)"):
        resolve(run_of(folder, "too many", parallel={"device": "cpu", "expert_parallel_size": 4}), 4)
    Placement.contiguous(6, 2, 3).save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"has 3 layers of 6 experts, the model 3 layers of 2, 4, 6 experts"):
        resolve(run_of(folder, "other", moe={"placement": str(tmp_path / "other.json")}), 1)


def test_sizes_of_a_pyramid_are_checked() -> None:
    shape = {"top_k": 2, "expert_hidden_size": 4}
    with pytest.raises(ValueError, match=r"moe.num_experts \(8\) must be the largest of moe.experts_of_layer \(4\)"):
        MoEConfig(num_experts=8, experts_of_layer=[2, 4], **shape)
    lists = [[[1, 0], [0, 1]], [[1, 2, 0], [0, 2, 1], [0, 1, 2]]]
    kept = {"num_experts": 3, "experts_of_layer": [2, 3], **shape}
    MoEConfig(routing=RoutingConfig(rule="c2r", top_t=[1, 2], lists=lists), **kept)
    with pytest.raises(ValueError, match=r"routing.top_t \(2\) must be in k-1..E-1 = 1..1 for k=2 of 2 experts"):
        MoEConfig(routing=RoutingConfig(rule="c2r", top_t=2, lists=lists), **kept)
    with pytest.raises(ValueError, match=r"routing.num_groups \(3\) must divide the 2 experts"):
        MoEConfig(routing=RoutingConfig(rule="group_limited", num_groups=3, max_devices=2), **kept)


def test_options_make_the_configuration() -> None:
    dense = ModelConfig(
        vocab_size=8, hidden_size=8, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=4
    )
    made = moe_config(dense, UpcycleOptions(None, 1, experts_per_layer=(0, 3, 3)))
    assert made.moe is not None
    assert (made.moe.num_experts, made.moe.experts_of_layer, made.dense_layers) == (3, None, {0: 4})
