"""Upcycling: the same logits as the dense model, what every expert is, and what is refused."""

from pathlib import Path

import pytest
import torch

from checkpoint_tools.source import open_source
from tests.small_models import dense_folder, run_tool

CASES = [(4, 2, 1), (4, 1, 1), (8, 4, 2), (8, 2, 2), (6, 3, 3), (12, 8, 4)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize(("num_experts", "top_k", "granularity"), CASES)
def test_an_upcycled_model_computes_the_same_at_first(
    num_experts: int, top_k: int, granularity: int, gate: str, dense: Path, tmp_path: Path
) -> None:
    sizes = ("--num-experts", num_experts, "--top-k", top_k, "--granularity", granularity, "--gate", gate)
    assert run_tool("upcycle", dense, tmp_path / "moe", *sizes) == 0
    assert run_tool("verify", dense, tmp_path / "moe", "--logits") == 0
    assert run_tool("verify", dense, tmp_path / "moe") == 1  # it is another model
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", dense, tmp_path / "hf", "--logits") == 0


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
