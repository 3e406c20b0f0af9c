"""Importance by gradients: the sums of a plain loop over transformers' gradients, on one rank and on several."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from checkpoint_tools.cluster import cluster
from checkpoint_tools.documents import blocks, documents
from checkpoint_tools.gradient import GradientOptions, gradient_importance
from checkpoint_tools.importance import FORMAT
from checkpoint_tools.source import open_source
from ep_engine.mesh import World, process_groups
from tests.distributed import run_ranks
from tests.small_models import dense_folder, run_tool
from tests.texts import text_model, write_documents

CPU = torch.device("cpu")
ROW = 24


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two clusters of text."""
    at = tmp_path_factory.mktemp("importance")
    text_model(at)
    cluster([write_documents(at / "corpus")], at / "clusters", 2)
    return at


def by_hand(at: Path, name: str, kernel: str, level: str, kind: str, rows: int) -> dict[tuple[str, int], Tensor]:
    """specs/llama_moe.md 1.4.2 in a loop over transformers' model."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(at / "model")
    apply = {"plain": lambda x: x, "l1_norm": torch.abs, "l2_norm": torch.square}[kernel]
    kept: dict[tuple[str, int], Tensor] = {}
    for i, layer in enumerate(model.model.layers):

        def keep(key: tuple[str, int], value: Tensor) -> None:
            value.retain_grad()
            kept[key] = value

        layer.mlp.gate_proj.register_forward_hook(lambda _m, _g, out, i=i: keep(("gate_proj", i), out))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, given, i=i: keep(("up_proj", i), given[0]))
    sums = {(p, i): torch.zeros(48) for p in ("up_proj", "gate_proj") for i in range(2)}
    texts = (document.text for document in documents([at / "clusters" / f"{name}.jsonl"]))
    chosen = list(blocks(texts, at / "model", ROW))[:rows]
    for row in chosen:
        logits = model(row.unsqueeze(0)).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for key, value in kept.items():
            assert value.grad is not None
            told = value.grad[0] * (value.detach()[0] if kind == "change" else 1)
            sums[key] += (apply(told) if level == "sample" else told).sum(dim=0)
    count = len(chosen) * (ROW - 1)
    return {key: (apply(value) if level == "total" else value) / count for key, value in sums.items()}


def read(folder: Path, name: str, kind: str) -> dict[tuple[str, int], Tensor]:
    keys = [(p, i) for p in ("up_proj", "gate_proj") for i in range(2)]
    return {(p, i): torch.load(folder / name / FORMAT.format(i, p, kind), weights_only=True) for p, i in keys}


@pytest.mark.parametrize("kernel", ["plain", "l1_norm", "l2_norm"])
@pytest.mark.parametrize(("level", "kind"), [("sample", "change"), ("total", "grad"), ("sample", "grad")])
def test_sums_are_those_of_a_plain_loop(kernel: Any, level: Any, kind: Any, at: Path, tmp_path: Path) -> None:
    options = GradientOptions(kernel, level, kind, sequence_length=ROW, max_tokens=5 * ROW)
    tokens = gradient_importance(open_source(at / "model"), at / "clusters", tmp_path / "out", options)
    assert tokens == {"0": 5 * ROW, "1": 5 * ROW}
    for name in ("0", "1"):
        expected = by_hand(at, name, kernel, level, kind, 5)
        for key, value_N in read(tmp_path / "out", name, kind).items():
            scale = float(expected[key].abs().max())
            torch.testing.assert_close(value_N, expected[key], rtol=1e-3, atol=1e-4 * scale)


def test_ranks_share_the_rows_and_find_the_same(at: Path, tmp_path: Path) -> None:
    options = GradientOptions(sequence_length=ROW, max_tokens=4 * ROW)
    gradient_importance(open_source(at / "model"), at / "clusters", tmp_path / "one", options)
    run_ranks(_on_a_rank, at, tmp_path / "two", world_size=2)
    for name in ("0", "1"):
        one, two = (read(tmp_path / folder, name, "change") for folder in ("one", "two"))
        for key, value_N in one.items():
            torch.testing.assert_close(two[key], value_N, rtol=1e-5, atol=1e-9)


def _on_a_rank(rank: int, world_size: int, at: Path, out: Path) -> None:
    options = GradientOptions(sequence_length=ROW, max_tokens=4 * ROW)
    with process_groups(World(rank=rank, size=world_size), CPU, 1, 60.0) as meshes:
        gradient_importance(open_source(at / "model"), at / "clusters", out, options, group=meshes.world)


def test_from_text_to_experts(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("cluster", at / "corpus", "--out", tmp_path / "clusters", "--clusters", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["documents"] == [20, 20, 20, 20]
    kinds = []
    for name in range(4):
        lines = [json.loads(line) for line in (tmp_path / "clusters" / f"{name}.jsonl").read_text().splitlines()]
        kinds.append({(line["id"] + (40 if line["file"] == "b.jsonl" else 0)) % 4 for line in lines})
    assert sorted(min(kind) for kind in kinds) == [0, 1, 2, 3]  # TF-IDF finds the kinds of words
    assert [len(kind) for kind in kinds] == [1] * 4
    rows = ("--clusters", tmp_path / "clusters", "--sequence-length", ROW, "--max-tokens", 100)
    assert run_tool("importance", at / "model", tmp_path / "scores", *rows) == 0
    assert "wrote" in capsys.readouterr().out
    split = ("--method", "gradient", "--importance", tmp_path / "scores", "--num-experts", 4, "--top-k", 2)
    assert run_tool("split", at / "model", tmp_path / "moe", *split) == 0
    assert run_tool("verify", at / "model", tmp_path / "moe", "--all-experts") == 0


def test_a_local_sentence_model_takes_the_place_of_words(tmp_path: Path) -> None:
    """A BERT of random weights: what it makes of the same text is the same, and of other words something else."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    texts = ["cat sat on mat", "moon sun star orbit"] * 6
    words = sorted({word for text in texts for word in text.split()})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path / "bert")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    assert cluster([tmp_path / "text.jsonl"], tmp_path / "out", 2, embed=tmp_path / "bert") == [6, 6]
    for name in "01":
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert len({json.loads(line)["content"] for line in lines}) == 1


def test_what_cannot_be_clustered_or_watched_is_refused(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(sentence: str, *arguments: object) -> None:
        assert run_tool(*arguments) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    refused("--clusters (81) must be in 1..80", "cluster", at / "corpus", "--out", tmp_path / "out", "--clusters", 81)
    into = ("cluster", at / "corpus", "--out", tmp_path / "out", "--clusters", 2)
    refused("holds no sentence-transformers model (no modules.json)", *into, "--embed", at / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
        refused("needs the library sentence-transformers", *into, "--embed", at / "model")
    clusters = ("--clusters", at / "clusters")
    refused("has no tokenizer", "importance", dense_folder(tmp_path / "dense"), tmp_path / "out", *clusters)
    refused("holds no .jsonl file", "importance", at / "model", tmp_path / "out", "--clusters", tmp_path / "dense")
    long = ("--sequence-length", 100_000)
    refused("longer than the model's positions (128)", "importance", at / "model", tmp_path / "out", *clusters, *long)
