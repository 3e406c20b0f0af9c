"""Reading LLaMA-MoE and C2R folders: the published fields, both gates, and what is not supported yet."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.export import export
from checkpoint_tools.families import family_of_model
from checkpoint_tools.source import open_source
from tests.small_models import dense_folder, edit_json, edit_weights, moe_checkpoint, routing_tables, run_tool


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C2R model in a Hugging Face folder."""
    at = tmp_path_factory.mktemp("models")
    export(moe_checkpoint(at / "engine", dense_folder(at / "dense"), routing=routing_tables("c2r")), at / "hf")
    return at / "hf"


@pytest.fixture
def copy(moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(moe, tmp_path / "model"))


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_keys_are_those_of_the_published_checkpoints(gate: str, tmp_path: Path) -> None:
    config = open_source(moe_checkpoint(tmp_path / "m", dense_folder(tmp_path / "d"), gate=gate)).config
    keys = family_of_model(config).keys(config)
    mlp = "model.layers.1.mlp"
    assert keys["layers.1.moe.experts.7.w_gate"] == f"{mlp}.calculator.experts.weight_gate.7"
    assert keys["layers.1.moe.experts.7.w_up"] == f"{mlp}.calculator.experts.weight_up.7"
    assert keys["layers.1.moe.experts.7.w_down"] == f"{mlp}.calculator.experts.weight_down.7"
    w_in = f"{mlp}.gate.gate_network.0.weight" if gate == "mlp" else f"{mlp}.gate.gate_network.weight"
    assert keys["layers.1.moe.router.w_in"] == w_in
    assert keys.get("layers.1.moe.router.w_out") == (f"{mlp}.gate.gate_network.2.weight" if gate == "mlp" else None)
    # Published: 34 per layer and 3 for 8 experts and an mlp gate, a rotary buffer and a noise matrix among them.
    assert len(set(keys.values())) == (32 if gate == "mlp" else 31) * 2 + 3


def test_a_list_alone_means_c2r_as_in_the_published_files(copy: Path) -> None:
    edit_json(copy / "config.json", lambda c: c.pop("routing_rule"))
    moe = open_source(copy).config.moe
    assert moe is not None
    assert (moe.routing.rule, moe.routing.top_t, moe.score_scale) == ("c2r", 3, 4.0)
    edit_json(copy / "config.json", lambda c: c.pop("collaborative_list"))
    moe = open_source(copy).config.moe
    assert moe is not None
    assert moe.routing.rule == "topk"


def test_training_options_of_the_published_files_are_carried(copy: Path) -> None:
    options = {"gates": "mlp", "gate_balance_loss_weight": 0.01, "capacity_factor": 1.25, "size_experts": None}
    edit_json(copy / "config.json", lambda c: c.update(options))
    config = open_source(copy).config
    assert config.moe is not None
    assert config.moe.expert_hidden_size == 6
    assert {key: config.carried.get(key) for key in options} == {**options, "size_experts": None}


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def _weights(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, edit)


def _spoil_list(folder: Path) -> None:
    def spoil(config: dict[str, Any]) -> None:
        config["collaborative_list"][1][2] = [0, 1, 3, 4, 5, 6, 6, 2]

    edit_json(folder / "config.json", spoil)


NOISE = "model.layers.0.mlp.gate.weight_noise.weight"
EXPERT = "model.layers.1.mlp.calculator.experts.weight_up.3"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "noise": (_config(gate_add_noise=True), "gate_add_noise is True, the engine computes only False"),
    "noise tensors": (_weights(lambda t: t.update({NOISE: torch.zeros(8, 32)})), f"holds {NOISE}, which"),
    "other gate": (
        _config(gate_type="SwitchBalancedGate"),
        "gate_type is 'SwitchBalancedGate', the engine computes only",
    ),
    "other calculator": (_config(calculator_type="SwitchDropTokenCalculator"), "calculator_type is 'SwitchDropToken"),
    "no softmax": (_config(gate_use_softmax=False), "gate_use_softmax is False, the engine computes only True"),
    "no scores": (_config(multiply_gate_scores=False), "multiply_gate_scores is False, the engine computes only True"),
    "weight norm": (_config(add_weight_norm=True), "add_weight_norm is True, the engine computes only False"),
    "residual": (_config(architectures=["LlamaMoEResidualForCausalLM"]), "'LlamaMoEResidualForCausalLM'.* known are"),
    "unequal": (_config(size_experts=[[5, 7, 6, 6, 6, 6, 6, 6]] * 2), "size_experts must be 6 for each of 8 experts"),
    "scale per layer": (
        _config(score_scale_factor=[4.0, 4.0]),
        "must be one number, .* per layer is not supported yet",
    ),
    "experts do not divide": (_config(num_experts=5), r"num_experts \(5\) must divide intermediate_size \(48\)"),
    "gate network": (_config(gate_network="gmm"), "gate: .* 'linear' or 'mlp', got 'gmm'"),
    "T too large": (_config(top_t=8), r"routing.top_t \(8\) must be in k-1..E-1 = 1..7"),
    "T too small": (_config(top_t=0), r"routing.top_t \(0\) must be in k-1..E-1 = 1..7"),
    "no permutation": (_spoil_list, "collaboration list of layer 1, expert 2 must be a permutation of 0..7"),
    "lists of another model": (_config(collaborative_list=[]), "routing.lists has 0 layers, the model has 2"),
    "expert missing": (_weights(lambda t: t.pop(EXPERT)), f"lacks {EXPERT}; "),
    "expert too many": (_weights(lambda t: t.update({f"{EXPERT}1": t[EXPERT].clone()})), f"holds {EXPERT}1, which"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_what_is_not_supported_gets_one_sentence(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = BAD_FOLDERS[name]
    spoil(copy)
    assert run_tool("convert", copy, tmp_path / "engine") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(message)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_inspect_counts_active_parameters(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("inspect", moe, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    experts = 2 * 3 * 48 * 32  # layers * matrices * N * D
    assert report["num_parameters"] - report["num_active_parameters"] == experts * 6 // 8
    assert report["config"]["moe"]["routing"]["rule"] == "c2r"
    assert run_tool("inspect", moe) == 0
    assert "LlamaMoEForCausalLM, 2 layers, 8 experts, top-2, c2r" in capsys.readouterr().out
