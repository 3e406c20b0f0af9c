"""Weights of experts: a plain count in fp64, and the published files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.condense.published_json import Shape, read_experts, read_order, read_weights
from checkpoint_tools.condense.texts import read_texts
from checkpoint_tools.condense.weights import count_weights
from checkpoint_tools.documents import documents
from checkpoint_tools.source import open_source
from tests.condense_cases import (
    KINDS,
    LENGTH,
    PUBLISHED,
    condensable,
    corpus,
    moe_blocks,
    plain_forward,
    token_of_last_text,
)
from tests.small_models import edit_json, edit_weights, run_tool

DEEPSEEK_16B = Shape(layers=27, experts=64, top_k=6)
published = pytest.mark.skipif(not PUBLISHED.exists(), reason="the data of the published run is not here")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_conditional_means_of_a_plain_count(kind: str, tmp_path: Path) -> None:
    model = condensable(tmp_path, kind)
    texts = read_texts(open_source(model), [corpus(tmp_path)], LENGTH)
    assert run_tool("condense", "weights", model, "--corpus", corpus(tmp_path), "--out", tmp_path / "w.json",
                    "--max-length", LENGTH) == 0  # fmt: skip
    plain = plain_forward(model)
    top_k = 3
    sums: dict[tuple[int, int], list[float]] = {}

    def count(layer: int) -> Any:
        def hook(block: Any, given: Any) -> None:
            share_TE = (given[0].flatten(0, -2) @ block.gate.weight.T).softmax(dim=-1)
            kept, ids = share_TE.topk(top_k, dim=-1)
            for e, p in zip(ids.flatten().tolist(), kept.flatten().tolist(), strict=True):
                sums.setdefault((layer, e), []).append(p)

        return hook

    for layer, (_, block) in enumerate(moe_blocks(plain)):
        block.register_forward_pre_hook(count(layer))
    with torch.no_grad():
        for ids in texts.ids:
            plain(ids.unsqueeze(0))
    found = json.loads((tmp_path / "w.json").read_text())
    assert len(found) == 3 * 6
    for layer in range(3):
        assert sum(found[f"{layer}-{e}"][1] for e in range(6)) == top_k * texts.num_tokens
        for e in range(6):
            seen = sums.get((layer, e), [])
            assert found[f"{layer}-{e}"][1] == len(seen)
            assert found[f"{layer}-{e}"][0] == pytest.approx(sum(seen), rel=1e-5)
            assert found[f"{layer}-{e}"][2] == pytest.approx(sum(seen) / max(len(seen), 1), rel=1e-5)
    weights = read_weights(tmp_path / "w.json", Shape(3, 6, 3))
    assert weights.count_LE.sum() == 3 * top_k * texts.num_tokens


def test_ranks_count_shares_of_the_texts(tmp_path: Path) -> None:
    """Also where there are more ranks than texts; a text keeps its number."""
    source = open_source(condensable(tmp_path, "deepseek"))
    texts = read_texts(source, [corpus(tmp_path)], LENGTH)
    assert len(texts.ids) == 6
    whole, shares = count_weights(source, texts), [texts.of_rank(rank, 7) for rank in range(7)]
    parts = [count_weights(source, share) for share in shares]
    assert torch.equal(torch.stack([part.count_LE for part in parts]).sum(dim=0), whole.count_LE)
    # Texts in other batches round differently in float32.
    total_LE = torch.stack([part.sum_LE for part in parts]).sum(dim=0)
    torch.testing.assert_close(total_LE, whole.sum_LE, rtol=1e-5, atol=0)
    share = texts.of_rank(1, 4)
    assert [share.text_of(0), share.text_of(share.num_tokens - 1)] == [1, 5]


def test_long_texts_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = condensable(tmp_path, "deepseek"), tmp_path / "long.jsonl"
    text.write_text(json.dumps({"text": "river " * 400}) + "\n" + json.dumps({"text": "oven"}) + "\n")
    given = ("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json", "--json")
    assert run_tool(*given) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["cut"]) == (2, 1)
    assert 96 < found["tokens"] < 96 + 10  # the model has 96 positions
    assert run_tool(*given, "--max-length", 5, "--max-texts", 1, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 5
    assert run_tool(*given) == 2
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err


def test_documents_of_the_published_kinds(tmp_path: Path) -> None:
    """specs/cd_moe.md 3 and 8: the first turn, a text without turns, and LMFlow's file."""
    from ep_engine.errors import UserError

    lines = [{"turns": ["one", "no"], "text": "no"}, {"turns": [], "text": "two", "url": "x"}]
    flow = {"type": "text_only", "instances": [{"text": "three"}, {"text": "four"}]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "c.json").write_text(json.dumps(flow, indent=4))
    found = list(documents([tmp_path / name for name in ("a.jsonl", "b.json", "c.json")]))
    assert [one.text for one in found] == ["one", "two", "one", "two", "three", "four"]
    assert (found[-1].file, found[-1].number) == ("c.json", 1)
    (tmp_path / "c.json").write_text(json.dumps({**flow, "instances": [{"text": "three"}, {"text": 4}]}))
    with pytest.raises(UserError, match=r"instance 2 of .*c\.json is no JSON object with `content` or `text`"):
        list(documents([tmp_path / "c.json"]))


def test_a_model_or_text_that_cannot_be_counted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.texts import text_model

    moe, dense = condensable(tmp_path / "moe", "deepseek"), text_model(tmp_path / "dense")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    text = corpus(tmp_path)
    for model, given, sentence in (
        (dense, text, "the model has no layers with experts, so there is nothing to condense"),
        (moe, tmp_path / "empty.jsonl", "holds no document"),
        (moe, tmp_path / "blank.jsonl", "holds no text but empty ones"),
        (moe, tmp_path / "missing.jsonl", "cannot be read"),
    ):
        assert run_tool("condense", "weights", model, "--corpus", given, "--out", tmp_path / "w.json") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "w.json").exists()
    (moe / "tokenizer.json").unlink()
    (moe / "tokenizer_config.json").unlink()
    assert run_tool("condense", "weights", moe, "--corpus", text, "--out", tmp_path / "w.json") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_value_that_is_not_a_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = condensable(tmp_path, "deepseek"), corpus(tmp_path)
    ids = read_texts(open_source(model), [text], None).ids
    token = token_of_last_text(ids)
    edit_weights(model, lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(float("nan")))
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json") == 1
    message = capsys.readouterr().err
    assert f"attention of layer 0 is not a number in text {len(ids) - 1} of the corpus" in message
    assert not (tmp_path / "w.json").exists()


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda w: w.pop("1-3"), "lacks 1-3, the model has 3 layers of 6 experts"),
    "of another": (lambda w: w.update({"3-0": [1.0, 1, 1.0]}), "has 3-0, the model has 3 layers of 6 experts"),
    "mean": (lambda w: w.update({"0-0": [1.0, 5, 0.3]}), "0-0 is [1.0, 5, 0.3], expected [sum, count, sum / count]"),
    "kind": (lambda w: w.update({"0-0": 0.1}), "0-0 is 0.1, expected"),
    "not a number": (lambda w: w.update({"0-0": [float("nan"), 5, 0.1]}), "expected [sum, count, sum / count]"),
    "infinite": (lambda w: w.update({"0-0": [float("inf"), 5, float("inf")]}), "0-0 is [inf, 5, inf], expected"),
    "infinitely many": (lambda w: w.update({"0-0": [1.0, float("inf"), 0.0]}), "0-0 is [1.0, inf, 0.0], expected"),
    "no count": (lambda w: w.update({"0-0": [1.0, 2.5, 0.4]}), "0-0 is [1.0, 2.5, 0.4], expected"),
    "too many": (lambda w: w.update({"0-0": [1.0, 1e300, 1e-300]}), "0-0 is [1.0, 1e+300, 1e-300], expected"),
    "too many for a float": (lambda w: w.update({"0-0": [1.0, 10**400, 0.0]}), "expected [sum, count, sum / count]"),
    "totals": (lambda w: w.update({"2-0": [3.0, w["2-0"][1] + 3, 3 / (w["2-0"][1] + 3)]}), "must have equally many"),
    "top_k": (
        lambda w: w.update({f"{i}-0": [3.0, w[f"{i}-0"][1] + 1, 3 / (w[f"{i}-0"][1] + 1)] for i in range(3)}),
        "a multiple of top_k (3)",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_of_another_model_are_refused(name: str, tmp_path: Path) -> None:
    from ep_engine.errors import UserError

    good = {f"{i}-{e}": [0.5, 5, 0.1] for i in range(3) for e in range(6)}
    (tmp_path / "w.json").write_text(json.dumps(good))
    assert read_weights(tmp_path / "w.json", Shape(3, 6, 3)).means[0, 0] == pytest.approx(0.1)
    change, sentence = BAD_WEIGHTS[name]
    edit_json(tmp_path / "w.json", change)
    with pytest.raises(UserError) as refused:
        read_weights(tmp_path / "w.json", Shape(3, 6, 3))
    assert sentence in str(refused.value)


def test_lists_and_orders_of_another_model_are_refused(tmp_path: Path) -> None:
    from ep_engine.errors import UserError

    shape, at = Shape(3, 6, 3), tmp_path / "x.json"

    def refusal(value: Any, read: Any, count: int) -> str:
        at.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(UserError) as refused:
            read(at, shape, count)
        return str(refused.value)

    lists = {"0": [1, 2], "1": [0, 5], "2": [3, 4]}
    assert "list of layer 1 must name distinct experts in 0..5" in refusal({**lists, "1": [0, 6]}, read_experts, 1)
    assert "list of layer 1 must name distinct experts in 0..5" in refusal({**lists, "1": [2, 2]}, read_experts, 1)
    assert "has lists of 2 layers" in refusal({"0": [1], "1": [0]}, read_experts, 1)
    assert "has 2 experts, --experts is 3" in refusal(lists, read_experts, 3)
    assert "must name distinct layers with experts in 0..2, got [0, 3]" in refusal([0, 3], read_order, 1)
    assert "has 2 layers, --layers is 3" in refusal([0, 1], read_order, 3)
    assert "must hold a list of layers, got dict" in refusal(lists, read_order, 1)
    assert "is not readable as JSON" in refusal("[0,", read_order, 1)
    with pytest.raises(UserError, match="cannot be read"):
        read_order(tmp_path / "missing.json", shape, 1)
    at.write_text(json.dumps(lists))
    assert read_experts(at, shape, 1) == [[1], [0], [3]]


@published
def test_published_files_load() -> None:
    """specs/cd_moe.md 3, 6 and 12."""
    weights = read_weights(PUBLISHED / "dynamic_weight.json", DEEPSEEK_16B)
    assert weights.count_LE.sum(dim=1).tolist() == [283740] * 27
    mean_LE = weights.means
    assert (float(mean_LE.min()), float(mean_LE.max())) == pytest.approx((0.03160, 0.25130), abs=5e-6)
    assert (mean_LE.argmin(), mean_LE.argmax()) == (20, 26 * 64 + 56)
    assert float(mean_LE.mean()) == pytest.approx(0.07059, abs=5e-6)
    written = json.loads((PUBLISHED / "dynamic_weight.json").read_text())
    for key, (_, _, mean) in written.items():
        layer, expert = map(int, key.split("-"))
        assert float(mean_LE[layer, expert]) == pytest.approx(mean, rel=1e-12)
    lists = read_experts(PUBLISHED / "layer_idx_to_expert_idx.greedy_jl.json", DEEPSEEK_16B, 6)
    assert lists[0] == [14, 42, 31, 0, 24, 41]
    assert lists[26] == [35, 54, 46, 62, 48, 31]
    order = read_order(PUBLISHED / "layer_idx_order.e6.json", DEEPSEEK_16B, 9)
    assert order == [19, 15, 22, 10, 12, 6, 14, 21, 26]
    chosen = [float(mean_LE[layer, experts].sum()) for layer, experts in enumerate(lists)]
    assert (chosen[0], chosen[13], chosen[26]) == pytest.approx((0.3737, 0.5246, 0.5570), abs=5e-5)
