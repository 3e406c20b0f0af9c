"""Splitting by co-activation: features are those of transformers, counts and graphs those of plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_tools.coactivation import CoActivation, Graph, hidden_features
from checkpoint_tools.source import open_source
from tests.small_models import dense_folder, run_tool
from tests.texts import text_model, write_documents


@pytest.mark.parametrize("gate_alone", [False, True])
def test_features_are_those_of_transformers(gate_alone: bool, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = open_source(dense_folder(tmp_path / "dense"))
    parts = [torch.randint(64, (n, 9), generator=torch.Generator().manual_seed(n)) for n in (2, 1)]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    expected: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, layer in enumerate(model.model.layers):
        if gate_alone:
            layer.mlp.gate_proj.register_forward_hook(
                lambda _m, _g, out, i=i: expected[i].append(torch.nn.functional.silu(out).flatten(0, 1))
            )
        else:
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _m, given, i=i: expected[i].append(given[0].flatten(0, 1))
            )
    with torch.no_grad():
        for part in parts:
            model(part)
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    order = []
    for layer, features_TN in hidden_features(source.config, source.tensors, parts, gate_alone=gate_alone):
        found[layer].append(features_TN)
        order.append(layer)
    assert order == [0, 0, 1, 1]
    for layer in (0, 1):
        for one, other in zip(found[layer], expected[layer], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["plain", "l1_norm", "l2_norm"])
def test_counts_are_clipped_part_by_part(kernel: str) -> None:
    parts = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    counted = CoActivation(5, kernel, 1.5)  # type: ignore[arg-type]
    expected = torch.zeros(5, 5)
    for part in parts:
        counted.add(part)
        f = {"plain": part, "l1_norm": part.abs(), "l2_norm": part**2}[kernel]
        for i in range(5):
            for j in range(5):
                expected[i, j] += min(float((f[:, i] * f[:, j]).sum()), 1.5)
    torch.testing.assert_close(counted.sum_NN, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(width=st.integers(2, 30), zeros=st.floats(0, 1), seed=st.integers(0, 2**30))
def test_edges_are_those_of_the_specification(width: int, zeros: float, seed: int) -> None:
    """specs/llama_moe.md 1.3 c: theta is the first decile that is not 0; an edge is at least 0.99 of it."""
    draw = np.random.default_rng(seed)
    sums = draw.random((width, width)) * (draw.random((width, width)) >= zeros)
    sums = (sums + sums.T).astype(np.float32)
    graph = Graph.of(sums)
    deciles = [float(np.percentile(sums, 10 * n)) for n in range(1, 11)]
    theta = next((value for value in deciles if value != 0), None)
    for i in range(width):
        edges = slice(graph.begin[i], graph.begin[i + 1])
        found = dict(zip(graph.neighbour[edges].tolist(), graph.weight[edges].tolist(), strict=True))
        if theta is None:
            assert found == {}
            continue
        relative = sums[i] / np.float32(0.99 * theta)
        near = {j for j in range(width) if abs(relative[j] - round(float(relative[j]))) < 1e-4}  # either side
        expected = {j: int(relative[j]) for j in range(width) if j != i and relative[j] >= 1}
        assert {j: w for j, w in found.items() if j not in near} == {j: w for j, w in expected.items() if j not in near}


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 6), experts=st.integers(1, 5), seed=st.integers(0, 2**30))
def test_experts_are_equal_whatever_the_graph(size: int, experts: int, seed: int) -> None:
    width = size * experts
    draw = np.random.default_rng(seed)
    sums = draw.random((width, width)).astype(np.float32) ** 4
    graph = Graph.of(sums + sums.T)
    neurons, cut = graph.partition(experts, seed=0)
    assert [len(one) for one in neurons] == [size] * experts
    assert sorted(np.concatenate(neurons).tolist()) == list(range(width))
    label = np.empty(width, int)
    for expert, of in enumerate(neurons):
        label[of] = expert
    between = sum(
        int(graph.weight[k])
        for i in range(width)
        for k in range(graph.begin[i], graph.begin[i + 1])
        if label[i] != label[graph.neighbour[k]]
    )
    total = max(int(graph.weight.sum()), 1)
    assert cut.balanced == pytest.approx(between / total if graph.weight.size else 1.0)


def test_neurons_that_are_active_together_share_an_expert() -> None:
    hidden_N = np.random.default_rng(0).permutation(48) % 4
    topic_T = torch.randint(4, (300,), generator=torch.Generator().manual_seed(0))
    active_TN = (topic_T[:, None] == torch.from_numpy(hidden_N)).float()
    counted = CoActivation(48, "l1_norm", 1e9)
    counted.add(active_TN + 0.01 * torch.rand(300, 48))
    neurons, cut = Graph.of(counted.sum_NN.numpy()).partition(4, seed=0)
    assert sorted(set(hidden_N[one].tolist()).pop() for one in neurons) == [0, 1, 2, 3]
    assert all(len(set(hidden_N[one].tolist())) == 1 for one in neurons)
    assert cut.balanced < 0.1


def test_weights_stay_within_what_metis_counts() -> None:
    sums = np.full((40, 40), 1.0, np.float32)
    sums[:20, :20] = 1e8
    graph = Graph.of(sums)
    assert graph.weight.min() >= 1
    assert graph.weight.sum(dtype=np.int64) < 2**31
    neurons, _ = graph.partition(2, seed=0)
    assert sorted(sorted(one.tolist())[0] for one in neurons) == [0, 20]


def test_a_model_is_split_on_text(tmp_path: Path) -> None:
    source, corpus = text_model(tmp_path), write_documents(tmp_path / "corpus")
    sizes = ("--num-experts", 4, "--top-k", 2, "--method", "coactivation")
    text = ("--corpus", corpus, "--max-tokens", 2000, "--sequence-length", 32)
    assert run_tool("split", source, tmp_path / "moe", *sizes, *text) == 0
    record = json.loads((tmp_path / "moe" / "split.json").read_text())
    assert (record["method"], record["kernel"], record["max_tokens"]) == ("coactivation", "l1_norm", 2000)
    assert all(0 <= cut["balanced"] <= 1 for cut in record["cuts"])
    assert len(record["cuts"]) == 2
    assert run_tool("verify", source, tmp_path / "moe", "--all-experts") == 0
    assert run_tool("split", source, tmp_path / "again", *sizes, *text) == 0
    again = json.loads((tmp_path / "again" / "split.json").read_text())
    assert again["neurons"] == record["neurons"]


BAD: dict[str, tuple[list[Any], str]] = {
    "nothing": (["--corpus", "none"], "holds no .jsonl or .txt file"),
    "too short": (["--max-tokens", 100], "is less than one row of --sequence-length (128) tokens"),
    "too long": (["--sequence-length", 200, "--max-tokens", 4000], "longer than the model's positions (128)"),
    "foretold": (["--dry-run"], "--dry-run cannot foretell --method coactivation"),
    "of another method": (["--files", "x"], "--files has no effect on --method coactivation"),
}


@pytest.mark.parametrize("name", BAD)
def test_text_that_does_not_do_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, corpus = text_model(tmp_path), write_documents(tmp_path / "corpus")
    (tmp_path / "none").mkdir()
    options, sentence = BAD[name]
    options = [tmp_path / "none" if one == "none" else one for one in options]
    given = ["--num-experts", 4, "--top-k", 2, "--method", "coactivation"]
    given += [] if "--sequence-length" in options else ["--sequence-length", 128]
    given += ["--corpus", corpus] if "--corpus" not in options else []
    assert run_tool("split", source, tmp_path / "moe", *given, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_a_model_without_a_tokenizer_and_a_broken_line_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_documents(tmp_path / "corpus")
    given = ("--num-experts", 4, "--top-k", 2, "--method", "coactivation", "--corpus", corpus)
    given += ("--sequence-length", 64)
    assert run_tool("split", dense_folder(tmp_path / "dense"), tmp_path / "moe", *given) == 2
    assert "has no tokenizer, which the text of the corpus needs" in capsys.readouterr().err
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"other": 1}\n')
    assert run_tool("split", text_model(tmp_path), tmp_path / "moe", *given) == 2
    assert "a.jsonl is no JSON object with `content` or `text`" in capsys.readouterr().err
