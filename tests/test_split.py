"""Splitting a dense model: the partition, the identity "all experts on = dense", and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from checkpoint_tools.partition import random_partition
from checkpoint_tools.source import open_source
from checkpoint_tools.split import SplitOptions, check_experts, cut_experts, split
from ep_engine.checkpoint import read_manifest
from ep_engine.errors import Fault
from tests.small_models import all_tensors, dense_folder, edit_json, edit_weights, moe_checkpoint, run_tool


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


@settings(deadline=None)
@given(num_experts=st.integers(1, 12), size=st.integers(1, 9), seed=st.integers(0, 2**40), layer=st.integers(0, 99))
def test_partition_holds_every_neuron_once(num_experts: int, size: int, seed: int, layer: int) -> None:
    partition = random_partition(num_experts * size, num_experts, seed, layer)
    assert [len(neurons) for neurons in partition] == [size] * num_experts
    assert all((np.diff(neurons) > 0).all() for neurons in partition)
    assert sorted(np.concatenate(partition)) == list(range(num_experts * size))
    again = random_partition(num_experts * size, num_experts, seed, layer)
    assert all(np.array_equal(a, b) for a, b in zip(partition, again, strict=True))


def test_layers_and_seeds_are_shuffled_apart() -> None:
    draws = [np.concatenate(random_partition(64, 4, seed, layer)) for seed in range(3) for layer in range(3)]
    assert len({tuple(draw) for draw in draws}) == len(draws)


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_experts_are_slices_of_the_dense_ffn(dense: Path, tmp_path: Path, gate: str) -> None:
    config = split(dense, tmp_path / "moe", SplitOptions(num_experts=6, top_k=2, seed=3, gate=gate))
    assert config.moe is not None
    assert (config.moe.score_scale, config.moe.expert_hidden_size) == (3.0, 8)
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    dense_tensors, moe_tensors = open_source(dense).tensors, open_source(tmp_path / "moe").tensors
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer, experts in enumerate(record["neurons"]):
        w_gate, w_up, w_down = (dense_tensors[f"layers.{layer}.ffn.{n}.weight"] for n in ("w_gate", "w_up", "w_down"))
        total = torch.zeros_like(x)
        for e, neurons in enumerate(experts):
            at = f"layers.{layer}.moe.experts.{e}"
            expert = [moe_tensors[f"{at}.{n}"] for n in ("w_gate", "w_up", "w_down")]
            for weight, expected in zip(expert, (w_gate[neurons], w_up[neurons], w_down[:, neurons]), strict=True):
                assert torch.equal(weight, expected)
            g, u, d = (weight.double() for weight in expert)
            total += (F.silu(x @ g.T) * (x @ u.T)) @ d.T
        g, u, d = w_gate.double(), w_up.double(), w_down.double()
        torch.testing.assert_close(total, (F.silu(x @ g.T) * (x @ u.T)) @ d.T, rtol=1e-9, atol=1e-9)
        w_in = moe_tensors[f"layers.{layer}.moe.router.w_in"]
        assert 0.1 < float(w_in.std()) < 0.3  # initializer_range of the small models is 0.2
        assert (f"layers.{layer}.moe.router.w_out" in moe_tensors) == (gate == "mlp")


def test_every_expert_on_at_equal_scores_is_the_dense_model(dense: Path, tmp_path: Path) -> None:
    """With k = E, a zero gate and factor E, each expert has weight 1."""
    from transformers import LlamaForCausalLM

    from checkpoint_tools.hf_modeling.modeling_llama_moe import LlamaMoEForCausalLM

    export(moe_checkpoint(tmp_path / "moe", dense, gate="linear"), tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", lambda c: c.update(num_selects=8, score_scale_factor=8.0))
    edit_weights(tmp_path / "hf", lambda t: [w.zero_() for name, w in t.items() if "gate_network" in name])
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(dense)(tokens).logits
        logits = LlamaMoEForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_model_from_either_kind_of_source(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "engine")
    options = SplitOptions(num_experts=8, top_k=2, seed=1)
    for name, source, chosen in [
        ("a", dense, options),
        ("b", tmp_path / "engine", options),
        ("other seed", dense, SplitOptions(num_experts=8, top_k=2, seed=2)),
        ("other gate", dense, SplitOptions(num_experts=8, top_k=2, seed=1, gate="linear")),
    ]:
        split(source, tmp_path / name, chosen)
    sums = {name: read_manifest(tmp_path / name)["checksums"] for name in ("a", "b", "other seed")}
    records = {name: json.loads((tmp_path / name / "split.json").read_text()) for name in ("a", "b", "other gate")}
    assert sums["a"] == sums["b"]
    assert records["a"] == records["b"] == records["other gate"]
    expert = "layers.0.moe.experts.0.w_up"
    assert sums["a"][expert] != sums["other seed"][expert]


def test_the_check_of_experts_finds_a_lost_and_a_changed_neuron() -> None:
    generator = torch.Generator().manual_seed(0)
    ffn = {name: torch.randn(12, 8, generator=generator) for name in ("w_gate", "w_up")}
    ffn["w_down"] = torch.randn(8, 12, generator=generator)
    partition = random_partition(12, 3, seed=0, layer=0)
    check_experts(ffn, cut_experts(ffn, partition), partition, layer=5)
    twice = [partition[0], partition[0], partition[2]]
    with pytest.raises(Fault, match="every neuron of w_gate once and unchanged: a neuron is in two of them"):
        check_experts(ffn, cut_experts(ffn, twice), twice, layer=5)
    for name, at in (("w_up", (2, 3)), ("w_down", (3, 2))):
        experts = cut_experts(ffn, partition)
        experts[1][name][at] = torch.nextafter(experts[1][name][at], torch.tensor(9.0))
        with pytest.raises(Fault, match=f"every neuron of {name} once and unchanged: expert 1 is not"):
            check_experts(ffn, experts, partition, layer=5)


@pytest.mark.parametrize(("metric", "on"), [("l2", "up_proj"), ("cos", "gate_proj")])
def test_neurons_of_a_cluster_share_an_expert(metric: str, on: str, dense: Path, tmp_path: Path) -> None:
    """Neurons are made of four directions; each expert gets the 12 of one."""
    hidden = torch.randperm(48, generator=torch.Generator().manual_seed(0)) % 4

    def group(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(f"{on}.weight"):
                tensor.copy_(torch.eye(4, tensor.shape[1])[hidden] + 0.01 * torch.randn(tensor.shape))

    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    edit_weights(source, group)
    arguments = ("--method", "clustering", "--metric", metric, "--on", on, "--num-experts", 4, "--top-k", 2)
    assert run_tool("split", source, tmp_path / "moe", *arguments) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    assert {name: record[name] for name in ("method", "metric", "on")} == {
        "method": "clustering",
        "metric": metric,
        "on": on,
    }
    for experts in record["neurons"]:
        assert [len(set(hidden[neurons].tolist())) for neurons in experts] == [1] * 4
    assert run_tool("verify", source, tmp_path / "moe", "--all-experts") == 0


PUBLISHED: dict[str, Callable[[list[int]], Any]] = {
    "ints": list,
    "numpy's ints": lambda labels: [np.int32(label) for label in labels],
    "floats": lambda labels: np.array(labels, dtype=np.float64),
    "lists of neurons": lambda labels: [np.flatnonzero(np.array(labels) == e).tolist()[::-1] for e in range(4)],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files_are_read_whatever_they_hold(kind: str, dense: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    labels = [torch.randperm(48, generator=torch.Generator().manual_seed(i)) % 4 for i in range(2)]
    for layer, label_N in enumerate(labels):
        value = PUBLISHED[kind](label_N.tolist())
        torch.save(value, files / f"layers.{layer}.mlp.gate_proj.weight", pickle_protocol=5)
    sizes = ("--num-experts", 4, "--top-k", 2)
    arguments = ("--method", "published", "--files", files, "--on", "gate_proj", *sizes)
    assert run_tool("split", dense, tmp_path / "moe", *arguments) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    assert [[sorted(neurons) for neurons in experts] for experts in record["neurons"]] == [
        [torch.nonzero(label_N == expert)[:, 0].tolist() for expert in range(4)] for label_N in labels
    ]
    ours = ("--method", "published", "--files", tmp_path / "moe" / "split", "--on", "gate_proj", *sizes)
    assert run_tool("split", dense, tmp_path / "again", *ours) == 0
    again = json.loads((tmp_path / "again" / "split.json").read_text())
    assert [[sorted(neurons) for neurons in experts] for experts in record["neurons"]] == again["neurons"]


UNEVEN: dict[str, tuple[list[Any], list[int], int, bool]] = {
    # of two layers: what a file holds; the sizes of the experts; the width of all; whether they are the dense FFN
    "labels": ([[0] * 20 + [1] * 4 + [2] * 12 + [3] * 12, [3, 2, 1, 0] * 12], [20, 4, 12, 12], 48, True),
    "lists": ([[[5, 1, 40], [7], [1, 2], [3, 4]], [[1, 5, 9], [8], [0, 2], [3, 4]]], [3, 1, 2, 2], 8, False),
    "pruned": ([[list(range(40, 8, -1))], [list(range(32))]], [32], 32, False),
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_published_experts_may_be_of_any_size(kind: str, dense: Path, tmp_path: Path) -> None:
    """Smaller ones are filled up with zeros, which are gone again in the export."""
    layers, sizes, width, whole = UNEVEN[kind]
    for layer, value in enumerate(layers):
        torch.save(value, tmp_path / f"layers.{layer}.mlp.up_proj.weight")
    arguments = ("--method", "published", "--num-experts", len(sizes), "--top-k", 1, "--score-scale", "3,2.5")
    assert run_tool("split", dense, tmp_path / "moe", "--files", tmp_path, *arguments) == 0
    made, source = open_source(tmp_path / "moe"), open_source(dense)
    assert made.config.moe is not None
    assert made.config.moe.score_scale == [3.0, 2.5]
    assert made.config.moe.expert_hidden_size == max(sizes)
    assert (made.config.moe.expert_sizes or [sizes])[0] == sizes
    record = json.loads((tmp_path / "moe/split.json").read_text())
    for layer, experts in enumerate(record["neurons"]):
        for e, neurons in enumerate(experts):
            w_down = made.tensors[f"layers.{layer}.moe.experts.{e}.w_down"]
            assert torch.equal(
                w_down[:, : len(neurons)], source.tensors[f"layers.{layer}.ffn.w_down.weight"][:, neurons]
            )
            assert not w_down[:, len(neurons) :].any()
    assert run_tool("verify", dense, tmp_path / "moe", "--all-experts") == (0 if whole else 1)
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["intermediate_size"], config["size_experts"][0]) == (width, sizes)
    assert all_tensors(tmp_path / "hf")["model.layers.0.mlp.calculator.experts.weight_up.0"].shape == (sizes[0], 32)
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0
    files = ("--files", tmp_path / "moe/split")  # as published again
    assert run_tool("split", dense, tmp_path / "again", *files, *arguments) == 0
    assert json.loads((tmp_path / "again/split.json").read_text())["neurons"] == record["neurons"]
    assert run_tool("describe-split", tmp_path / "moe", "--picture", tmp_path / "split.png") == 0


def test_experts_that_share_neurons_may_be_larger_than_a_share(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_LEN = torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0))
    given = ("--method", "gradient", "--importance", write_importance(tmp_path / "scores", score_LEN))
    sizes = ("--num-experts", 4, "--top-k", 2, "--expert-size")
    assert run_tool("split", dense, tmp_path / "moe", *given, "--assignment", "shared", *sizes, 20) == 0
    record = json.loads((tmp_path / "moe/split.json").read_text())
    assert record["neurons"] == score_LEN.sort(dim=2, descending=True, stable=True).indices[:, :, :20].tolist()
    published = torch.load(tmp_path / "moe/split/layers.1.mlp.up_proj.weight", weights_only=True)
    assert published == record["neurons"][1]
    for more, sentence in (
        (("--assignment", "shared", *sizes, 49), "--expert-size (49) of 0 residual experts and one other is more than"),
        ((*sizes, 20), "--expert-size 20 has no effect on --assignment optimal"),
    ):
        assert run_tool("split", dense, tmp_path / "refused", *given, *more) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("scale", ["many", "1,2,3", "nan"])
def test_scales_that_cannot_be_are_refused(
    scale: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--num-experts", 4, "--top-k", 2)
    assert run_tool("split", dense, tmp_path / "moe", *sizes, "--score-scale", scale) == 2
    words = "moe.score_scale has 3 layers, the model has 2" if "," in scale else f"--score-scale ({scale}) must be"
    assert words in capsys.readouterr().err


class Harmful:
    """Would make a folder when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def test_split_files_that_do_not_fit_or_run_something_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "layers.0.mlp.up_proj.weight"
    for value, sentence in (
        ([0, 1, 2, 3] * 11, "must hold 48 labels in 0..3, each of them there, or 4 lists"),
        ([0, 1, 2] * 16, "got list of 48 numbers; correct --num-experts or the file"),
        ([0.5] * 48, "must hold 48 labels"),
        ([0, 1, 2, 4] * 12, "must hold 48 labels"),
        ([[0] * 12] * 4, "lists of distinct neurons in 0..47"),
        ([[1, 2], [3], [4, 48], [5]], "lists of distinct neurons in 0..47"),
        ([[1, 2], [3], [], [5]], "lists of distinct neurons in 0..47"),
        ([[1, 2], [3], [4]], "lists of distinct neurons in 0..47"),
        (float("inf"), "got float"),
        (Harmful(), "wants to run posix.mkdir"),
    ):
        torch.save(value, path)
        arguments = ("--method", "published", "--files", tmp_path, "--num-experts", 4, "--top-k", 2)
        assert run_tool("split", dense, tmp_path / "moe", *arguments) == 2
        assert sentence in capsys.readouterr().err
    path.write_bytes(b"no archive")
    assert run_tool("split", dense, tmp_path / "moe", *arguments) == 2
    assert "was not saved by torch" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "moe").exists()


def write_importance(folder: Path, score_LEN: Tensor, kind: str = "up_proj") -> Path:
    for layer, score_EN in enumerate(score_LEN):
        for expert, score_N in enumerate(score_EN):
            (folder / str(expert)).mkdir(parents=True, exist_ok=True)
            torch.save(score_N.clone(), folder / str(expert) / f"layers.{layer}.mlp.{kind}.weight.change")
    return folder


@pytest.mark.parametrize("assignment", ["optimal", "greedy", "shared"])
def test_neurons_go_where_they_are_needed(assignment: str, dense: Path, tmp_path: Path) -> None:
    """Of 12 experts, so that folders 10 and 11 come last: neuron n of layer l is for expert (n + l) % 12."""
    wanted_LN = (torch.arange(48) + torch.arange(2)[:, None]) % 12
    score_LEN = torch.rand(2, 12, 48) + 2 * (wanted_LN[:, None] == torch.arange(12)[:, None])
    scores = write_importance(tmp_path / "scores", score_LEN)
    arguments = ("--method", "gradient", "--importance", scores, "--assignment", assignment)
    assert run_tool("split", dense, tmp_path / "moe", *arguments, "--num-experts", 12, "--top-k", 2) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    assert (record["method"], record["assignment"]) == ("gradient", assignment)
    for layer, experts in enumerate(record["neurons"]):
        for expert, neurons in enumerate(experts):
            best_first = sorted(neurons, key=lambda n: -float(score_LEN[layer, expert, n]))
            assert neurons == (best_first if assignment == "shared" else sorted(neurons))
            assert sorted(neurons) == torch.nonzero(wanted_LN[layer] == expert)[:, 0].tolist()


def test_published_code_takes_clusters_in_the_order_of_text(dense: Path, tmp_path: Path) -> None:
    wanted_N = torch.arange(48) % 12
    score_LEN = torch.rand(2, 12, 48) + 2 * (wanted_N == torch.arange(12)[:, None])
    scores = write_importance(tmp_path / "scores", score_LEN)
    arguments = ("--method", "gradient", "--importance", scores, "--assignment", "greedy", "--reference-compat")
    assert run_tool("split", dense, tmp_path / "moe", *arguments, "--num-experts", 12, "--top-k", 2) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    order = sorted(range(12), key=str)  # 0, 1, 10, 11, 2, ...
    assert record["reference_compat"] is True
    for experts in record["neurons"]:
        assert experts == [torch.nonzero(wanted_N == cluster)[:, 0].tolist() for cluster in order]


def test_published_code_clusters_by_l2_whatever_it_is_told(dense: Path, tmp_path: Path) -> None:
    """On rows in groups, some of them close and some wide, with which the two metrics do not agree."""
    draw = torch.Generator().manual_seed(6)
    centre, spread = torch.randn(4, 32, generator=draw), torch.tensor([0.1, 0.5, 2.0, 6.0])
    rows = torch.arange(48) % 4
    weight = centre[rows] + spread[rows, None] * torch.randn(48, 32, generator=draw)

    def group(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor.copy_(weight)

    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    edit_weights(source, group)
    sizes = ("--method", "clustering", "--num-experts", 4, "--top-k", 2)
    found = {}
    for name, more in (("l2", ()), ("cos", ("--metric", "cos")), ("compat", ("--metric", "cos", "--reference-compat"))):
        assert run_tool("split", source, tmp_path / name, *sizes, *more) == 0
        found[name] = json.loads((tmp_path / name / "split.json").read_text())["neurons"]
    assert found["compat"] == found["l2"] != found["cos"]


@pytest.mark.parametrize("assignment", ["optimal", "greedy"])
def test_what_most_clusters_want_becomes_residual(assignment: str, dense: Path, tmp_path: Path) -> None:
    """Of 4 routed and 2 residual experts of 8 neurons: all want the first 16, then each its own."""
    score_LEN = torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0))
    score_LEN[:, :, :16] += 4
    own_N = (torch.arange(48) - 16) // 8
    score_LEN += 2 * (own_N == torch.arange(4)[:, None])
    scores = write_importance(tmp_path / "scores", score_LEN)
    arguments = ("--method", "gradient", "--importance", scores, "--assignment", assignment, "--gate-init", "neurons")
    sizes = ("--num-experts", 4, "--residual-experts", 2, "--top-k", 2)
    assert run_tool("split", dense, tmp_path / "moe", *arguments, *sizes) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    assert record["residual_experts"] == 2
    for experts in record["neurons"]:
        assert sorted(experts[0] + experts[1]) == list(range(16))
        assert [sorted(neurons) for neurons in experts[2:]] == [list(range(16 + 8 * e, 24 + 8 * e)) for e in range(4)]
    assert run_tool("verify", dense, tmp_path / "moe", "--all-experts") == 0
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaMoEResidualForCausalLM"]
    assert (config["intermediate_size_moe"], config["intermediate_size_residual"]) == (32, 16)
    tensors, whole = open_source(tmp_path / "moe").tensors, open_source(dense).tensors
    rows = torch.nn.functional.normalize(whole["layers.1.ffn.w_up.weight"][24:32], dim=1)
    torch.testing.assert_close(tensors["layers.1.moe.router.w_in"][1], rows.mean(dim=0))
    assert torch.equal(tensors["layers.1.moe.router.w_out"], torch.eye(4))
    files = ("--method", "published", "--files", tmp_path / "moe" / "split", *sizes)
    assert run_tool("split", dense, tmp_path / "again", *files) == 0
    again = json.loads((tmp_path / "again" / "split.json").read_text())
    assert again["neurons"] == record["neurons"]


def test_scores_that_do_not_fit_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = write_importance(tmp_path / "scores", torch.rand(2, 4, 48))
    out = tmp_path / "moe"

    def refused(sentence: str, folder: Path = scores, experts: int = 4) -> None:
        arguments = ("--method", "gradient", "--importance", folder, "--num-experts", experts, "--top-k", 2)
        assert run_tool("split", dense, out, *arguments) == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert not out.exists()

    refused("is no folder", tmp_path / "none")
    refused("expected one with a number for each of 8 experts", experts=8)
    path = scores / "2" / "layers.1.mlp.up_proj.weight.change"
    for value, sentence in (
        (torch.rand(47), "must be a tensor of 48 finite numbers, got (47,)"),
        (torch.full((48,), torch.nan), "finite numbers"),
        ([1.0] * 48, "got list"),
        (Harmful(), "cannot be read"),
    ):
        torch.save(value, path)
        refused(sentence)
    path.write_bytes(b"no file of torch")
    refused("cannot be read")
    path.unlink()
    refused("there must be one of")
    assert not (tmp_path / "harmed").exists()


BAD_OPTIONS = {
    "uneven": (
        ["--num-experts", 7, "--top-k", 2],
        r"--num-experts \(7\) must divide the FFN width \(48\) .* choose 4, 6, 8",
    ),
    "no experts": (["--num-experts", 0, "--top-k", 2], r"--num-experts \(0\) must divide"),
    "too many selected": (["--num-experts", 4, "--top-k", 5], r"moe.top_k \(5\) must be in 1..moe.num_experts \(4\)"),
    "none selected": (["--num-experts", 4, "--top-k", 0], r"moe.top_k \(0\) must be in 1"),
    "unknown gate": (["--num-experts", 4, "--top-k", 2, "--gate", "gmm"], "gate: .* 'linear', 'mlp', .* got 'gmm'"),
    "unknown method": (
        ["--num-experts", 4, "--top-k", 2, "--method", "x"],
        "Invalid value for '--method': 'x' is not one of 'random', 'clustering', ",
    ),
    "a metric of nothing": (
        ["--num-experts", 4, "--top-k", 2, "--metric", "cos"],
        "--metric has no effect on --method random; leave it out",
    ),
    "residual of nothing": (
        ["--num-experts", 3, "--top-k", 2, "--residual-experts", 1],
        r"--residual-experts \(1\) has no effect on --method random",
    ),
    "uneven with residual": (
        ["--num-experts", 4, "--top-k", 2, "--residual-experts", 1, "--method", "gradient", "--importance", "x"],
        r"--num-experts and --residual-experts \(5 in all\) must divide the FFN width \(48\)",
    ),
    "no files": (["--num-experts", 4, "--top-k", 2, "--method", "published"], "--method published needs --files"),
    "no scores": (["--num-experts", 4, "--top-k", 2, "--method", "gradient"], "--method gradient needs --importance"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_refused(name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = BAD_OPTIONS[name]
    assert run_tool("split", dense, tmp_path / "moe", *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(message)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_split_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-experts", 4, "--top-k", 2)
    biased = dense_folder(tmp_path / "biased", mlp_bias=True)
    assert run_tool("split", biased, tmp_path / "x", *sizes) == 2
    assert "have biases (mlp_bias is true)" in capsys.readouterr().err
    moe = moe_checkpoint(tmp_path / "moe", dense_folder(tmp_path / "dense"))
    assert run_tool("split", moe, tmp_path / "x", *sizes) == 2
    assert "has 8 experts per layer already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_nan_weights_are_a_fault_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = dense_folder(tmp_path / "dense")
    edit_weights(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][0].fill_(float("nan")))
    assert run_tool("split", source, tmp_path / "x", "--num-experts", 4, "--top-k", 2) == 1
    assert "outputs first differ at layer 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_gate_may_have_a_noise_matrix(dense: Path, tmp_path: Path) -> None:
    assert run_tool("split", dense, tmp_path / "moe", "--num-experts", 4, "--top-k", 2, "--gate-noise") == 0
    made = open_source(tmp_path / "moe")
    assert made.config.moe is not None
    assert made.config.moe.gate_noise
    assert not made.tensors["layers.0.moe.router.w_noise"].any()  # a deviation of ln 2 for all
    assert run_tool("export", tmp_path / "moe", tmp_path / "hf") == 0
    assert run_tool("verify", tmp_path / "moe", tmp_path / "hf") == 0
