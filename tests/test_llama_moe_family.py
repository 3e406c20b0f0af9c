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
from ep_engine.config import make_config
from ep_engine.errors import UserError
from ep_engine.inference.loaded_model import Rule, ruled
from ep_engine.resolve import resolve
from tests.small_models import (
    SIZES,
    all_tensors,
    assert_same_bits,
    dense_folder,
    edit_json,
    edit_weights,
    moe_checkpoint,
    routing_tables,
    run_tool,
)


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
    keys = {entry: place.key for entry, place in family_of_model(config).places(config).items()}
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
NORM = "model.layers.0.mlp.calculator.mlp_norm.weight"
EXPERT = "model.layers.1.mlp.calculator.experts.weight_up.3"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no noise tensors": (_config(gate_add_noise=True), f"lacks {NOISE} and 1 more keys; "),
    "noise tensors": (_weights(lambda t: t.update({NOISE: torch.zeros(8, 32)})), f"holds {NOISE}, which"),
    "other gate": (
        _config(gate_type="SwitchBalancedGate"),
        "gate_type is 'SwitchBalancedGate', the engine computes only",
    ),
    "other calculator": (_config(calculator_type="SwitchDropTokenCalculator"), "calculator_type is 'SwitchDropToken"),
    "no scores": (_config(multiply_gate_scores=False), "multiply_gate_scores is False, the engine computes only True"),
    "softmax of words": (_config(gate_use_softmax="no"), "gate_use_softmax must be true or false, got 'no'"),
    "no weight norm": (_config(add_weight_norm=True), f"lacks {NORM} and 1 more keys; "),
    "weight norm": (_weights(lambda t: t.update({NORM: torch.ones(1)})), f"holds {NORM}, which"),
    "classifier": (
        _config(architectures=["LlamaMoEForSequenceClassification"]),
        "lacks score.weight; the weight files do not fit config.json",
    ),
    "residual": (
        _config(architectures=["LlamaMoEResidualForCausalLM"]),
        r"intermediate_size_moe \(9632\) and intermediate_size_residual \(1376\), .* must add up to .* \(48\)",
    ),
    "no head": (_config(architectures=["LlamaMoEModel"]), r"architectures is \['LlamaMoEModel'\], known are"),
    "sizes that do not add up": (
        _config(size_experts=[[5, 6, 6, 6, 6, 6, 6, 6]] * 2),
        "size_experts must have 2 rows of 8 sizes that add up to 48",
    ),
    "other sizes than weights": (
        _config(size_experts=[[5, 7, 6, 6, 6, 6, 6, 6]] * 2),
        r"experts.weight_gate.0 .* has shape \(6, 32\), config.json says \(5, 32\)",
    ),
    "scales of another model": (_config(score_scale_factor=[4.0] * 3), "moe.score_scale has 3 layers, the model has 2"),
    "scale of words": (_config(score_scale_factor="4"), "score_scale_factor must be a number, or a list with one"),
    "experts do not divide": (
        _config(num_experts=5, size_experts=None),
        r"num_experts \(5\) must divide their width \(48\)",
    ),
    "gate network": (_config(gate_network="gmm"), "gate: .* 'linear', 'mlp', .* got 'gmm'"),
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


def _gated(t: dict[str, Tensor]) -> None:
    for layer in range(2):
        t[f"model.layers.{layer}.mlp.gate.weight_noise.weight"] = torch.randn(8, 32)


def _normed(t: dict[str, Tensor]) -> None:
    for layer, scale in enumerate((3.5, -0.7)):
        t[f"model.layers.{layer}.mlp.calculator.mlp_norm.weight"] = torch.tensor([scale])


def _unequal(t: dict[str, Tensor]) -> None:
    """Moves the last neuron of expert 0 of each layer to expert 1."""
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.calculator.experts"
        for name, dim in (("weight_gate", 0), ("weight_up", 0), ("weight_down", 1)):
            first, second = t[f"{at}.{name}.0"], t[f"{at}.{name}.1"]
            t[f"{at}.{name}.1"] = torch.cat([second, first.narrow(dim, 5, 1)], dim=dim)
            t[f"{at}.{name}.0"] = first.narrow(dim, 0, 5).contiguous()


VARIANTS: dict[str, Callable[[Path], None]] = {
    "noise": lambda f: (_config(gate_add_noise=True)(f), _weights(_gated)(f)),  # type: ignore[func-returns-value]
    "unequal": lambda f: (_config(size_experts=[[5, 7, *[6] * 6]] * 2)(f), _weights(_unequal)(f)),  # type: ignore[func-returns-value]
    "weight norm": lambda f: (_config(add_weight_norm=True)(f), _weights(_normed)(f)),  # type: ignore[func-returns-value]
    "no softmax": _config(gate_use_softmax=False),
    "scales": _config(score_scale_factor=[4.0, 2.5]),
    "rotary buffers": _weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_are_read_run_and_written_back(name: str, copy: Path, tmp_path: Path) -> None:
    VARIANTS[name](copy)
    assert run_tool("convert", copy, tmp_path / "engine") == 0
    assert run_tool("verify", copy, tmp_path / "engine") == 0  # our modeling file against the engine
    assert run_tool("export", tmp_path / "engine", tmp_path / "back") == 0
    before = {key: tensor for key, tensor in all_tensors(copy).items() if "inv_freq" not in key}
    assert_same_bits(before, all_tensors(tmp_path / "back"))
    assert run_tool("verify", tmp_path / "engine", tmp_path / "back") == 0


def residual_folder(folder: Path, **more: Any) -> Path:
    """A model of 6 routed and 2 residual experts of 6 neurons, under the published names."""
    from checkpoint_tools.hf_modeling.configuration_llama_moe import LlamaMoEResidualConfig
    from checkpoint_tools.hf_modeling.modeling_llama_moe import LlamaMoEResidualForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size_moe": 36, "intermediate_size_residual": 12, "num_experts": 6, "num_selects": 2}
    config = LlamaMoEResidualConfig(
        **sizes, num_experts_residual=2, score_scale_factor=3.0, score_scale_factor_residual=2.0, **more
    )
    LlamaMoEResidualForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_weighting", [False, True])
def test_residual_models_have_the_published_keys_and_come_back(use_weighting: bool, tmp_path: Path) -> None:
    folder = residual_folder(tmp_path / "hf", use_weighting=use_weighting)
    keys = {key.replace("layers.1.", "layers.{i}.") for key in all_tensors(folder) if "layers.1.mlp" in key}
    mlp = "model.layers.{i}.mlp"
    assert f"{mlp}.residual_block.gate.gate_network.weight" in keys
    assert f"{mlp}.residual_block.calculator.experts.weight_gate.1" in keys
    assert f"{mlp}.moe_layer.gate.weight_noise.weight" in keys
    assert (f"{mlp}.weighting_network.0.weight" in keys) == use_weighting
    assert f"{mlp}.moe_layer.calculator.experts.weight_down.5" in keys
    assert run_tool("convert", folder, tmp_path / "engine") == 0
    assert run_tool("verify", folder, tmp_path / "engine") == 0
    assert run_tool("export", tmp_path / "engine", tmp_path / "back") == 0
    assert_same_bits(all_tensors(folder), all_tensors(tmp_path / "back"))
    assert run_tool("verify", folder, tmp_path / "back") == 0


@pytest.mark.parametrize("kind", ["LlamaMoE", "LlamaMoEResidual"])
def test_classifiers_are_converted_and_not_trained(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import checkpoint_tools.hf_modeling.configuration_llama_moe as configurations
    import checkpoint_tools.hf_modeling.modeling_llama_moe as models

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "num_experts": 6, "num_selects": 2, "num_labels": 3, "pad_token_id": 0}
    if kind == "LlamaMoEResidual":
        sizes |= {"intermediate_size_moe": 36, "intermediate_size_residual": 12}
    model: Any = getattr(models, f"{kind}ForSequenceClassification")(getattr(configurations, f"{kind}Config")(**sizes))
    model.save_pretrained(tmp_path / "hf")
    assert all_tensors(tmp_path / "hf")["score.weight"].shape == (3, 32)
    assert run_tool("convert", tmp_path / "hf", tmp_path / "engine") == 0
    assert open_source(tmp_path / "engine").config.num_labels == 3
    assert run_tool("verify", tmp_path / "hf", tmp_path / "engine") == 0
    assert run_tool("export", tmp_path / "engine", tmp_path / "back") == 0
    assert_same_bits(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))
    assert run_tool("verify", tmp_path / "engine", tmp_path / "back") == 0
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back", trust_remote_code=True)
    tokens = torch.arange(1, 33).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)
    words = f"{tmp_path / 'engine'} tells 3 labels apart and predicts no token"
    with pytest.raises(UserError, match=words):
        ruled(tmp_path / "engine", Rule())
    data = {"train": "text", "sequence_length": 8, "batch_size": 2}
    sections = {"model": {"checkpoint": str(tmp_path / "engine")}, "data": data, "train": {"steps": 1}}
    run = {**sections, "output": {"folder": str(tmp_path / "run")}}
    with pytest.raises(UserError, match=words):
        resolve(make_config(run, "a test"), 1)
    capsys.readouterr()
    assert run_tool("export", tmp_path / "engine", tmp_path / "other", "--family", "mixtral") == 2
    assert not (tmp_path / "other").exists()


def test_a_residual_layer_is_the_sum_of_the_specification(tmp_path: Path) -> None:
    """specs/llama_moe.md 3.6: y = MoE(x) + sum over j of softmax(W x)_j * factor * FFN_j(x); weighed, if asked for."""
    from ep_engine.model import Decoder
    from ep_engine.parallelize import entries_of

    source = open_source(residual_folder(tmp_path / "hf", use_weighting=True))
    model = Decoder(source.config)
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    layer = model.moe_layers()[1]
    x = torch.randn(5, 32)
    weighed, _ = layer(x)
    weights = layer.residual_weighting(x)
    layer.residual_weighting = None
    whole, _ = layer(x)
    residual, layer.residual = layer.residual, None
    routed, _ = layer(x)
    assert residual is not None
    at = "layers.1.moe.residual"
    shares = torch.softmax(x @ source.tensors[f"{at}.gate.weight"].T, dim=1)
    expected = torch.zeros_like(x)
    for j in range(2):
        gate, up, down = (source.tensors[f"{at}.each.{j}.{n}.weight"] for n in ("w_gate", "w_up", "w_down"))
        expected += shares[:, j, None] * 2.0 * ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    torch.testing.assert_close(whole - routed, expected, rtol=1e-4, atol=1e-5)
    two = torch.softmax(x @ source.tensors["layers.1.moe.residual_weighting.weight"].T, dim=1)
    torch.testing.assert_close(weights, two)
    torch.testing.assert_close(weighed, two[:, :1] * routed + two[:, 1:] * expected, rtol=1e-4, atol=1e-5)
