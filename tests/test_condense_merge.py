"""Merged experts: groups and means of another computation, and a smaller model that everything can read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from checkpoint_tools.condense.merge import MergeOptions, Order, grouped, prepare
from checkpoint_tools.condense.texts import Texts, read_texts
from checkpoint_tools.condense.weights import count_weights
from checkpoint_tools.inspect import inspect
from checkpoint_tools.source import open_source
from ep_engine.deferred import Tensors
from ep_engine.errors import Fault
from tests.condense_cases import KINDS, LENGTH, condensable, corpus, moe_blocks, plain_forward
from tests.small_models import edit_weights, moe_checkpoint, routing_tables, run_tool
from tests.test_condense_apply import TOKENS, engine_logits, logits_of
from tests.texts import text_model

NAMES = ("w_gate", "w_up", "w_down")


def test_groups_by_hand() -> None:
    """Experts 2 and 4 are used alike, and the smaller id stays."""
    counts = torch.tensor([3, 9, 7, 0, 7])
    alike_EE = torch.eye(5)
    alike_EE[0, 1], alike_EE[0, 2] = 0.1, 0.8
    alike_EE[3, 1], alike_EE[3, 2], alike_EE[3, 4] = 0.5, 0.5, 0.9  # 4 is like it, but does not stay
    alike_EE[4, 1], alike_EE[4, 2] = -0.2, -0.1
    assert grouped(counts, alike_EE, 2) == [[1, 3], [2, 0, 4]]
    assert grouped(counts, alike_EE, 4) == [[0], [1], [2], [4, 3]]


def router_logits(model: Any, texts: Texts) -> list[Tensor]:
    """(T, E) of every layer with experts, by the plain model in float64."""
    found: list[list[Tensor]] = [[] for _ in moe_blocks(model)]
    for rows, (_, block) in zip(found, moe_blocks(model), strict=True):

        def note(block: Any, args: tuple[Tensor], rows: list[Tensor] = rows) -> None:
            rows.append(args[0].flatten(0, -2) @ block.gate.weight.double().T)

        block.register_forward_pre_hook(note)
    with torch.no_grad():
        for ids in texts.ids:
            model(ids.unsqueeze(0), use_cache=False)
    return [torch.cat(rows) for rows in found]


def merged_by_hand(experts: list[dict[str, Tensor]], counts: list[int]) -> dict[str, Tensor]:
    """The mean of a group, the first of which gives the order of neurons."""
    first, total = experts[0], {name: counts[0] * experts[0][name].double() for name in NAMES}
    for expert, count in zip(experts[1:], counts[1:], strict=True):
        score = first["w_gate"] @ expert["w_gate"].T + first["w_up"] @ expert["w_up"].T
        score = score + first["w_down"].T @ expert["w_down"]
        _, order = linear_sum_assignment(score.numpy(), maximize=True)
        for name in NAMES:
            weight = expert[name].double()
            total[name] += count * (weight[:, order] if name == "w_down" else weight[order])
    return {name: total[name] / sum(counts) for name in NAMES}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_models_are_those_of_another_computation(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model, text, small = condensable(tmp_path, kind, seed=3), corpus(tmp_path), tmp_path / "small"
    given = ("condense", "merge", model, small, "--corpus", text, "--experts", 4, "--max-length", LENGTH)
    assert run_tool(*given, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    source, after = open_source(model), open_source(small)
    texts = read_texts(source, [text], LENGTH)
    counts_LE = count_weights(source, texts).count_LE.tolist()
    for index, (layer, logits_TE) in enumerate(
        zip(source.config.moe_layers(), router_logits(plain_forward(model), texts), strict=True)
    ):
        counts = counts_LE[index]
        centers = sorted(sorted(range(6), key=lambda e: (-counts[e], e))[:4])
        groups = {center: [center] for center in centers}
        for e in set(range(6)) - set(centers):
            alike = [float(torch.cosine_similarity(logits_TE[:, e], logits_TE[:, c], dim=0)) for c in centers]
            groups[centers[alike.index(max(alike))]].append(e)
        assert told["groups"][str(index)] == list(groups.values())
        at = f"layers.{layer}.moe"
        assert torch.equal(after.tensors[f"{at}.router.w_in"], source.tensors[f"{at}.router.w_in"][centers])
        for place, members in enumerate(groups.values()):
            experts = [{name: source.tensors[f"{at}.experts.{e}.{name}"] for name in NAMES} for e in members]
            wanted = merged_by_hand(experts, [counts[e] for e in members])
            for name in NAMES:
                found = after.tensors[f"{at}.experts.{place}.{name}"]
                torch.testing.assert_close(found.double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert any(len(members) > 1 for groups in told["groups"].values() for members in groups)
    merged = {name for name in after.tensors if ".moe.experts." in name or ".moe.router." in name}
    assert all(torch.equal(after.tensors[name], source.tensors[name]) for name in after.tensors.keys() - merged)
    # Smaller, and a model like any other, in the engine and in transformers.
    assert inspect(small).num_parameters == told["parameters"] < told["parameters_before"]
    torch.testing.assert_close(engine_logits(small), logits_of(small), rtol=1e-4, atol=1e-4)
    assert run_tool("export", small, tmp_path / "hf") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, logits_of(small), rtol=1e-4, atol=1e-4)


def test_neurons_in_another_order_are_the_same_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts 3, 4, 5 are 0, 1, 2 with their neurons shuffled, and are routed alike: what is merged is as it was."""
    model, text = condensable(tmp_path, "deepseek", seed=5), corpus(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def twins(tensors: dict[str, Tensor]) -> None:
        for layer in (1, 2, 3):
            at = f"model.layers.{layer}.mlp"
            tensors[f"{at}.gate.weight"][3:] = 0.9 * tensors[f"{at}.gate.weight"][:3]
            for e in range(3):
                order = torch.randperm(12, generator=generator)
                for name in ("gate_proj", "up_proj", "down_proj"):
                    weight = tensors[f"{at}.experts.{e}.{name}.weight"]
                    shuffled = weight[:, order] if name == "down_proj" else weight[order]
                    tensors[f"{at}.experts.{e + 3}.{name}.weight"] = shuffled.contiguous()

    edit_weights(model, twins)
    assert run_tool("condense", "merge", model, tmp_path / "small", "--corpus", text, "--experts", 3, "--json") == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    before, after, pairs = open_source(model).tensors, open_source(tmp_path / "small").tensors, 0
    for layer in (1, 2, 3):
        for place, members in enumerate(groups[str(layer - 1)]):
            if sorted(e % 3 for e in members) != [members[0] % 3] * 2:
                continue  # alone, or with one that it is no twin of: both of another pair are used more
            pairs += 1
            for name in NAMES:
                was, found = (
                    tensors[f"layers.{layer}.moe.experts.{e}.{name}"]
                    for tensors, e in ((before, members[0]), (after, place))
                )
                torch.testing.assert_close(found, was)
    assert pairs


def test_some_layers_are_merged_and_the_others_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, small = condensable(tmp_path, "deepseek"), corpus(tmp_path), tmp_path / "small"
    (tmp_path / "o.json").write_text("[2, 0, 1]")
    assert run_tool("condense", "merge", model, small, "--corpus", text, "--experts", 3, "--layers", 2, "--order",
                    tmp_path / "o.json") == 0  # fmt: skip
    source = open_source(small)
    assert source.config.experts_of_layer() == [3, 6, 3]
    before = open_source(model).tensors
    kept = [name for name in before if name.startswith("layers.2.")]
    assert all(torch.equal(before[name], source.tensors[name]) for name in kept)
    torch.testing.assert_close(engine_logits(small), logits_of(small), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run_tool("export", small, tmp_path / "hf") == 2
    assert "DeepseekForCausalLM cannot express moe.experts_of_layer [3, 6, 3] of the model" in capsys.readouterr().err


def test_what_cannot_be_merged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, dense = condensable(tmp_path, "deepseek"), corpus(tmp_path), text_model(tmp_path / "dense")
    (tmp_path / "o.json").write_text("[2, 0]")
    order = ("--order", tmp_path / "o.json")
    gated = {rule: moe_checkpoint(tmp_path / rule, dense, routing=routing_tables(rule)) for rule in ("topk", "c2r")}
    for source, more, sentence in (
        (model, ("--experts", 2), "--experts (2) must be in top_k..E-1 = 3..5"),
        (model, ("--experts", 6), "--experts (6) must be in top_k..E-1 = 3..5"),
        (model, ("--experts", 3, "--layers", 1), "--layers and --order go together"),
        (model, ("--experts", 3, *order), "--layers and --order go together"),
        (model, ("--experts", 3, *order, "--layers", 4), "--layers (4) must be in 1..3, the layers with experts"),
        (model, ("--experts", 3, *order, "--layers", 3), "has 2 layers, --layers is 3"),
        (dense, ("--experts", 3), "the model has no layers with experts"),
        (gated["c2r"], ("--experts", 3), "the model has the rule c2r, whose tables name experts, so experts cannot"),
        (gated["topk"], ("--experts", 3), "the model has a gate that is as wide inside as there are experts"),
    ):
        assert run_tool("condense", "merge", source, tmp_path / "small", "--corpus", text, *more) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "small").exists()


def test_a_weight_that_is_not_a_number_is_named() -> None:
    weights = {f"layers.1.moe.experts.{e}.{name}": torch.ones(4, 4) for e in (0, 1) for name in NAMES}
    weights["layers.1.moe.experts.1.w_up"][0, 0] = float("nan")
    with pytest.raises(Fault, match="experts 0 and 1 of layer 1 have weights that are not numbers"):
        Order(Tensors.of(weights), 1).like(0, 1)


def test_counts_of_another_corpus_make_another_output(tmp_path: Path) -> None:
    """Groups may be the same, but not the shares of their members, so an interrupted run is not gone on with."""
    model, texts = condensable(tmp_path, "deepseek"), (corpus(tmp_path / "a", 6), corpus(tmp_path / "b", 7))
    one, other = (prepare(model, tmp_path / "out", [text], MergeOptions(5))[0].options for text in texts)
    assert one["counts"] != other["counts"]
    assert one["counts"] == prepare(model, tmp_path / "out", [texts[0]], MergeOptions(5))[0].options["counts"]
