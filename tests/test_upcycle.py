"""Upcycling: the same logits as the dense model, what every expert is, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.forward import routed
from checkpoint_tools.source import open_source
from checkpoint_tools.split import SplitOptions
from checkpoint_tools.split import moe_config as split_config
from checkpoint_tools.upcycle import UpcycleOptions, moe_config
from ep_engine.entries import expected_entries
from ep_engine.model_config import ModelConfig
from tests.family_cases import family_folder
from tests.small_models import assert_same_bits, dense_folder, run_tool

CASES = [(4, 2, 1), (4, 1, 1), (8, 4, 2), (8, 2, 2), (6, 3, 3), (12, 8, 4)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize("gate", ["linear", "mlp", "mlp_gelu", "cosine"])
@pytest.mark.parametrize(("num_experts", "top_k", "granularity"), CASES)
def test_an_upcycled_model_computes_the_same_at_first(
    num_experts: int, top_k: int, granularity: int, gate: str, dense: Path, tmp_path: Path
) -> None:
    sizes = ("--num-experts", num_experts, "--top-k", top_k, "--granularity", granularity, "--gate", gate)
    assert run_tool("upcycle", dense, tmp_path / "moe", *sizes) == 0
    assert run_tool("verify", dense, tmp_path / "moe", "--logits") == 0
    assert run_tool("verify", dense, tmp_path / "moe") == 1  # it is another model
    if gate in ("linear", "mlp"):  # LLaMA-MoE's
        assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
        assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0
        assert run_tool("verify", dense, tmp_path / "hf", "--logits") == 0


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families_are_upcycled_and_split_as_well(family: str, tmp_path: Path) -> None:
    source = family_folder(tmp_path / "dense", "mistral_no_window" if family == "mistral" else family)
    sizes = ("--num-experts", 4, "--top-k", 2)
    for tool in ("upcycle", "split"):
        assert run_tool(tool, source, tmp_path / tool, *sizes) == 0
        assert run_tool("export", tmp_path / tool, tmp_path / f"{tool}-hf") == 0
        assert run_tool("verify", tmp_path / tool, tmp_path / f"{tool}-hf") == 0
    assert run_tool("verify", source, tmp_path / "upcycle-hf", "--logits") == 0
    assert run_tool("verify", source, tmp_path / "split-hf", "--all-experts") == 0


def test_an_upcycled_mistral_becomes_a_mixtral(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = family_folder(tmp_path / "dense", "mistral")  # whose window Mixtral has as well
    assert run_tool("upcycle", source, tmp_path / "moe", "--num-experts", 4, "--top-k", 2) == 0
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf", "--family", "mixtral") == 0
    assert run_tool("verify", source, tmp_path / "hf", "--logits") == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize("scale", ["w_down", "cube-root", "none"])
def test_raw_softmax_weights_need_a_scale(
    scale: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """specs/dense2moe.md 7: w_down by E G / K is exact where scores are equal; the cube root is not, nor is none."""
    sizes = ("--num-experts", 8, "--top-k", 4, "--granularity", 2, "--score", "softmax", "--scale", scale)
    assert run_tool("upcycle", dense, tmp_path / "moe", *sizes, "--gate-init", "zero", "--json") == 0
    gap = json.loads(capsys.readouterr().out)["logit_gap"]
    exact = scale == "w_down"
    assert (gap < 1e-4) == exact
    assert run_tool("verify", dense, tmp_path / "moe", "--logits") == (0 if exact else 1)
    whole, parts = open_source(dense).tensors, open_source(tmp_path / "moe").tensors
    factor = {"w_down": 4.0, "cube-root": 4.0 ** (1 / 3), "none": 1.0}[scale]
    wanted = whole["layers.0.ffn.w_down.weight"].chunk(2, dim=1)[1] * factor
    torch.testing.assert_close(parts["layers.0.moe.experts.3.w_down"], wanted)
    capsys.readouterr()
    assert run_tool("upcycle", dense, tmp_path / "drawn", *sizes) == 0  # a random router: scores are not equal
    assert "logits differ from those of the source by up to" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(4, 2, 1), (8, 4, 2)])
def test_sigmoid_weights_add_up_and_need_no_scale(
    sizes: tuple[int, int, int], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*zip(("--num-experts", "--top-k", "--granularity"), sizes, strict=True)]
    options = [*(word for pair in given for word in pair), "--score", "sigmoid"]
    assert run_tool("upcycle", dense, tmp_path / "moe", *options, "--json") == 0  # a random router
    found = json.loads(capsys.readouterr().out)
    assert found["logit_gap"] < 1e-4
    moe = found["model"]["moe"]
    assert (moe["score"], moe["renormalise"], moe["score_scale"]) == ("sigmoid", True, float(sizes[2]))
    assert run_tool("upcycle", dense, tmp_path / "noisy", *options, "--noise", 0.1) == 0
    assert "logits differ from those of the source by up to" in capsys.readouterr().out
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 2  # LLaMA-MoE knows no sigmoid


def test_a_split_with_sigmoid_weights_is_weighed_by_them(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--num-experts", 8, "--top-k", 2, "--score", "sigmoid")
    assert run_tool("split", dense, tmp_path / "moe", *sizes, "--json") == 0
    assert json.loads(capsys.readouterr().out)["logit_gap"] < 1e-4  # all experts on
    made = open_source(tmp_path / "moe")
    x_TD = torch.randn(9, made.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = routed(x_TD, made.config, 0, made.tensors)
    chosen_TK = found.logits_TE.sigmoid().gather(1, found.ids_TK)
    torch.testing.assert_close(found.weights_TK, 8 / 2 * chosen_TK / chosen_TK.sum(dim=1, keepdim=True))


def test_mollama_takes_raw_softmax_and_layers_by_start_and_step(dense: Path, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", num_hidden_layers=5)
    layers = ("--start-layer", 1, "--layer-step", 2, "--score", "softmax", "--gate", "cosine")
    assert run_tool("upcycle", source, tmp_path / "moe", "--num-experts", 4, "--top-k", 2, *layers) == 0
    config = open_source(tmp_path / "moe").config
    assert config.moe_layers() == [1, 3]
    assert config.dense_layers == {0: 48, 2: 48, 4: 48}
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf", "--family", "mollama") == 0
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["moe_start_layer"], written["moe_layer_freq"], written["gate_type"]) == (1, 2, "gmm")
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0


def test_layers_that_stay_dense_are_exported_for_llama_moe(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", num_hidden_layers=5)
    layers = ("--start-layer", 2, "--layer-step", 2)
    assert run_tool("upcycle", source, tmp_path / "moe", "--num-experts", 4, "--top-k", 2, *layers) == 0
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", source, tmp_path / "hf", "--logits") == 0
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0


def test_residual_experts_begin_with_nothing(dense: Path, tmp_path: Path) -> None:
    assert run_tool("upcycle", dense, tmp_path / "moe", "--num-experts", 4, "--top-k", 1, "--residual") == 0
    assert run_tool("verify", dense, tmp_path / "moe", "--logits") == 0
    tensors = open_source(tmp_path / "moe").tensors
    assert not tensors["layers.1.moe.experts.3.w_down"].any()
    assert torch.equal(tensors["layers.1.moe.experts.3.w_up"], open_source(dense).tensors["layers.1.ffn.w_up.weight"])
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", dense, tmp_path / "hf", "--logits") == 0


def test_noise_and_dropped_neurons(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-experts", 2, "--top-k", 1, "--seed", 3)
    whole = open_source(dense).tensors
    spread = float(whole["layers.0.ffn.w_up.weight"].std())
    for name, option in (("noise", 0.1), ("drop", 0.25)):
        capsys.readouterr()
        for folder in (name, f"{name} again"):
            assert run_tool("upcycle", dense, tmp_path / folder, *sizes, f"--{name}", option) == 0
        assert "logits differ from those of the source" in capsys.readouterr().out
        tensors, again = open_source(tmp_path / name).tensors, open_source(tmp_path / f"{name} again").tensors
        assert_same_bits(tensors, again)
        gap = {e: tensors[f"layers.0.moe.experts.{e}.w_up"] - whole["layers.0.ffn.w_up.weight"] for e in range(2)}
        assert not torch.equal(gap[0], gap[1])
        changed = [set((d != 0).any(dim=1).nonzero()[:, 0].tolist()) for d in gap.values()]
        if name == "noise":
            assert float(gap[0].std()) == pytest.approx(0.1 * spread, rel=0.1)
        else:
            down = tensors["layers.0.moe.experts.0.w_down"] - whole["layers.0.ffn.w_down.weight"]
            assert len(changed[0]) == 12  # a quarter of 48, the same of every matrix
            assert set((down != 0).any(dim=0).nonzero()[:, 0].tolist()) == changed[0]
            fresh = tensors["layers.0.moe.experts.0.w_up"][sorted(changed[0])]
            assert float(fresh.std()) == pytest.approx(spread, rel=0.2)


LLAMA_2_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    intermediate_size=11008,
)  # fmt: skip
PARAMETERS = {  # specs/dense2moe.md 5: E, first layer, step -> layers with experts, parameters of LLaMA-2-7B upcycled
    (8, 16, 2): (8, 14_313_590_784),
    (8, 16, 1): (16, 21_888_765_952),
    (2, 28, 2): (2, 7_008_964_608),
    (8, 0, 2): (16, 21_888_765_952),
    (8, 8, 2): (12, 18_101_178_368),
    (8, 0, 1): (32, 37_039_116_288),
}


@pytest.mark.parametrize(
    ("num_experts", "top_k", "keys", "parameters", "active"),
    [(16, 2, 1859, 6_742_618_112, 2_953_064_448), (16, 4, 1859, 6_742_618_112, 3_494_129_664),
     (8, 2, 1091, 6_740_514_816, 3_493_074_944)],
)  # fmt: skip
def test_keys_and_parameters_of_the_published_models(
    num_experts: int, top_k: int, keys: int, parameters: int, active: int
) -> None:
    """specs/llama_moe.md 2.7, of LLaMA-MoE-v1; one of the keys of a layer is a rotary buffer, which is no weight."""
    options = SplitOptions(num_experts, top_k, gate_noise=True)
    config = split_config(LLAMA_2_7B, options)
    sizes = {name: math.prod(shape) for name, shape in expected_entries(config).items()}
    assert len(sizes) + config.num_layers == keys
    assert sum(sizes.values()) == parameters
    experts = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    noise = sum(size for name, size in sizes.items() if name.endswith("w_noise"))
    assert parameters - noise - experts * (num_experts - top_k) // num_experts == active
    assert sum(math.prod(shape) for shape in expected_entries(LLAMA_2_7B).values()) == 6_738_415_616


@pytest.mark.parametrize(("gate", "parameters"), [("mlp", 1_050_880), ("cosine", 1_050_625)])
def test_parameters_of_a_gate_are_those_of_the_specification(gate: Any, parameters: int) -> None:
    """specs/dense2moe.md 5: r = 256, 8 experts."""
    config = moe_config(LLAMA_2_7B, UpcycleOptions(8, 2, gate="mlp_gelu" if gate == "mlp" else gate))
    of_layer = (shape for name, shape in expected_entries(config).items() if name.startswith("layers.3.moe.router."))
    assert sum(map(math.prod, of_layer)) == parameters


@pytest.mark.parametrize("pattern", PARAMETERS)
def test_parameters_are_those_of_the_specification(pattern: tuple[int, int, int]) -> None:
    num_experts, start, step = pattern
    config = moe_config(LLAMA_2_7B, UpcycleOptions(num_experts, 1, start_layer=start, layer_step=step))
    layers, parameters = PARAMETERS[pattern]
    assert len(config.moe_layers()) == layers
    assert sum(math.prod(shape) for shape in expected_entries(config).values()) == parameters


def test_experts_are_slices_and_rows_of_the_router_are_groups(dense: Path, tmp_path: Path) -> None:
    sizes = ("--num-experts", 6, "--top-k", 3, "--granularity", 3)
    assert run_tool("upcycle", dense, tmp_path / "moe", *sizes) == 0
    whole, parts = open_source(dense).tensors, open_source(tmp_path / "moe").tensors
    for expert in range(6):
        for name, dim in (("w_gate", 0), ("w_up", 0), ("w_down", 1)):
            wanted = whole[f"layers.1.ffn.{name}.weight"].chunk(3, dim=dim)[expert % 3]
            assert torch.equal(parts[f"layers.1.moe.experts.{expert}.{name}"], wanted)
    rows = parts["layers.1.moe.router.w_in"]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[3], rows[5])
    assert not torch.equal(rows[2], rows[3])


REFUSED = {
    "a width": (
        ["--num-experts", 5, "--top-k", 5, "--granularity", 5],
        r"--granularity (5) must divide the FFN width (48)",
    ),
    "experts": (
        ["--num-experts", 5, "--top-k", 2, "--granularity", 2],
        "--granularity (2) must divide --num-experts (5)",
    ),
    "torn groups": (
        ["--num-experts", 4, "--top-k", 3, "--granularity", 2],
        "--granularity (2) must divide --top-k (3)",
    ),
    "too many": (["--num-experts", 4, "--top-k", 5], "moe.top_k (5) must be in 1..moe.num_experts (4)"),
    "no layer": (["--num-experts", 4, "--top-k", 2, "--start-layer", 2], "--start-layer (2) must be below"),
    "a size of nothing": (
        ["--num-experts", 4, "--top-k", 2, "--gate-hidden-size", 8],
        "--gate-hidden-size (8) has no effect on --gate linear",
    ),
    "a scale of nothing": (
        ["--num-experts", 4, "--top-k", 2, "--scale", "none"],
        "--scale none has no effect on --score softmax_of_chosen",
    ),
    "a scale of nothing, for sigmoids": (
        ["--num-experts", 4, "--top-k", 2, "--score", "sigmoid", "--scale", "cube-root"],
        "--scale cube-root has no effect on --score sigmoid, whose weights add up to 1",
    ),
    "no direction": (
        ["--num-experts", 4, "--top-k", 2, "--gate", "cosine", "--gate-init", "zero"],
        "--gate-init zero is not for --gate cosine",
    ),
    "a gate": (
        ["--num-experts", 4, "--top-k", 2, "--gate", "gmm"],
        "'gmm' is not one of 'linear', 'mlp', 'mlp_gelu', 'cosine'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_do_not_fit_are_refused(
    name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, sentence = REFUSED[name]
    assert run_tool("upcycle", dense, tmp_path / "moe", *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_experts_and_biases_are_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-experts", 4, "--top-k", 2)
    assert run_tool("upcycle", dense, tmp_path / "moe", *sizes) == 0
    assert run_tool("upcycle", tmp_path / "moe", tmp_path / "again", *sizes) == 2
    assert "the model has 4 experts per layer already" in capsys.readouterr().err
    biased = dense_folder(tmp_path / "biased", mlp_bias=True)
    assert run_tool("upcycle", biased, tmp_path / "again", *sizes) == 2
    assert "the FFNs have biases" in capsys.readouterr().err
