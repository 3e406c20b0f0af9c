"""Search for experts: the choices of a brute force through another model's forward in fp64, for every layer."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint_tools.condense.experts import Candidates, Choice, choose_experts, greedy, ranked_experts
from checkpoint_tools.condense.objectives import Objective, distances_to
from checkpoint_tools.condense.published_json import Shape, Weights, read_experts, read_weights
from checkpoint_tools.condense.texts import Texts, read_texts
from checkpoint_tools.condense.weights import count_weights
from checkpoint_tools.source import open_source
from ep_engine.errors import Fault
from tests.condense_cases import (
    BY_HAND,
    KINDS,
    LENGTH,
    condensable,
    condense_by_hand,
    corpus,
    js_by_hand,
    moe_blocks,
    plain_forward,
    restore,
    token_of_last_text,
)
from tests.distributed import run_ranks
from tests.small_models import edit_weights, run_tool

SEEDS, EXPERTS = 20, 6


def test_divergence_of_equal_states_is_zero_and_of_others_at_most_ln_2() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    ab, ba, aa = distances_to("js", a)(b), distances_to("js", b)(a), distances_to("js", a)(a)
    assert aa.tolist() == [0.0] * 5
    torch.testing.assert_close(ab, ba)
    assert float(ab.mean()) == pytest.approx(js_by_hand(a, b), rel=1e-9)  # batchmean: a mean over tokens, a sum over D
    far = torch.eye(5, 16, dtype=torch.float64) * 100
    assert distances_to("js", far)(far.roll(1, dims=0)).tolist() == pytest.approx([float(torch.tensor(2.0).log())] * 5)
    one, other = a[0].softmax(0), b[0].softmax(0)
    assert float(distances_to("kl", a)(b)[0]) == pytest.approx(float((one * (one / other).log()).sum()), rel=1e-6)
    assert float(distances_to("mse", a)(b)[0]) == pytest.approx(float(((a[0] - b[0]) ** 2).mean()))
    cosine = float(a[0] @ b[0] / a[0].norm() / b[0].norm())
    assert float(distances_to("cosine", a)(b)[0]) == pytest.approx(1 - cosine)


def states(model: Any, texts: Texts, layer: int) -> list[Tensor]:
    """What decoder layer `layer` puts out for each text; the last one's after the final norm."""
    rows = torch.nn.utils.rnn.pad_sequence(list(texts.ids), batch_first=True)  # no token sees the padding after it
    with torch.no_grad():
        hidden = model(rows, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
    return [row[: len(ids)] for row, ids in zip(hidden, texts.ids, strict=True)]


def brute_force(
    model: Any, texts: Texts, weights: list[list[float]], count: int, objective: str = "js"
) -> list[Choice]:
    """specs/cd_moe.md 5, a forward of the whole model for every candidate."""
    found = []
    for (i, block), weight in zip(moe_blocks(model), weights, strict=True):
        original, choice = states(model, texts, i), Choice([], [])
        while len(choice.experts) < count:
            best, smallest = -1, 1e6
            for c in range(len(weight)):
                if c in choice.experts or weight[c] != weight[c]:
                    continue
                experts = [*choice.experts, c]
                condense_by_hand(block, experts, [weight[e] for e in experts])
                pairs = zip(original, states(model, texts, i), strict=True)
                distance = sum(BY_HAND[objective](a, b) for a, b in pairs) / len(original)
                if distance < smallest:
                    best, smallest = c, distance
            choice.experts.append(best)
            choice.distances.append(smallest)
        restore(block)
        found.append(choice)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_choices_are_those_of_a_brute_force(kind: str, seed: int, tmp_path: Path) -> None:
    """For every layer and every number of experts, which are the first ones of a list."""
    folder = condensable(tmp_path, kind, seed=seed, moe_layers=2)
    source, model = open_source(folder), plain_forward(folder)
    texts = read_texts(source, [corpus(tmp_path, 4)], LENGTH)
    weights = count_weights(source, texts).means.nan_to_num(nan=0.1)  # with few tokens some experts are nobody's choice
    found = [choice for _, choice in choose_experts(source, texts, weights, EXPERTS)]
    for choice, wanted in zip(found, brute_force(model, texts, weights.tolist(), EXPERTS), strict=True):
        assert choice.experts == wanted.experts
        assert choice.distances == pytest.approx(wanted.distances, rel=1e-3)  # float32 beside float64
    if seed == 1:
        for count in range(EXPERTS):
            for (_, few), choice in zip(choose_experts(source, texts, weights, count), found, strict=True):
                assert few == Choice(choice.experts[:count], choice.distances[:count])


@pytest.mark.parametrize("objective", ["mse", "cosine", "kl"])
def test_other_objectives_choose_as_a_brute_force(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = condensable(tmp_path, "deepseek", seed=2, moe_layers=2), corpus(tmp_path, 4)
    assert run_tool("condense", "weights", folder, "--corpus", text, "--out", tmp_path / "w.json") == 0
    capsys.readouterr()
    given = ("condense", "experts", folder, "--corpus", text, "--weights", tmp_path / "w.json", "--max-length", LENGTH)
    assert run_tool(*given, "--experts", 3, "--objective", objective, "--out", tmp_path / "e.json", "--json") == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    texts = read_texts(open_source(folder), [text], LENGTH)
    weights = read_weights(tmp_path / "w.json", Shape(2, EXPERTS, 3)).means.tolist()
    for one, wanted in zip(found, brute_force(plain_forward(folder), texts, weights, 3, objective), strict=True):
        assert one["experts"] == wanted.experts
        assert one["distances"] == pytest.approx(wanted.distances, rel=1e-3)


def made_up(outputs: Tensor, original_TD: Tensor, ids: range | None = None) -> Candidates:
    return Candidates(original_TD, torch.zeros_like(original_TD), outputs, ids or range(len(outputs)), lambda x: x)


def test_equal_candidates_go_to_the_smallest_id_and_nan_is_never_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    original_TD = torch.randn(6, 8, generator=generator)
    texts = Texts((torch.arange(4), torch.arange(2)))
    same = torch.randn(6, 8, generator=generator)
    outputs = torch.stack([torch.full((6, 8), torch.nan), same, original_TD, same, original_TD])
    weight_E = torch.ones(5, dtype=torch.float64)
    for objective in ("js", "kl", "mse", "cosine"):
        objective_: Objective = objective
        assert greedy(made_up(outputs, original_TD), texts, weight_E, 1, objective=objective_).experts == [2]
    assert greedy(made_up(outputs[[1, 3, 1]], original_TD), texts, weight_E[:3], 3).experts == [0, 1, 2]
    with pytest.raises(Fault, match="no candidate of the layer has a distance that is a number"):
        greedy(made_up(outputs[:1], original_TD), texts, weight_E[:1], 1)


def test_every_text_weighs_the_same() -> None:
    """Two candidates, each right in one text of 1 and of 9 tokens, but more wrong in the other."""
    original_TD = torch.zeros(10, 4)
    far, near = torch.tensor([5.0, 0, 0, 0]), torch.tensor([2.0, 0, 0, 0])
    wrong_in_long = torch.cat([original_TD[:1], near.expand(9, 4)])
    wrong_in_short = torch.cat([far.expand(1, 4), original_TD[1:]])
    texts, weight = Texts((torch.arange(1), torch.arange(9))), torch.ones(2, dtype=torch.float64)
    assert greedy(made_up(torch.stack([wrong_in_long, wrong_in_short]), original_TD), texts, weight, 1).experts == [0]


def test_a_frozen_search_goes_on_and_writes_the_published_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = condensable(tmp_path, "deepseek"), corpus(tmp_path)
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json") == 0
    given = ("condense", "experts", model, "--corpus", text, "--weights", tmp_path / "w.json", "--max-length", LENGTH)
    capsys.readouterr()
    assert run_tool(*given, "--out", tmp_path / "whole.json", "--experts", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert [whole[str(i)] for i in range(3)] == [one["experts"] for one in found["layers"]]
    assert read_experts(tmp_path / "whole.json", Shape(3, 6, 3), 2) == [whole[str(i)][:2] for i in range(3)]
    left = tmp_path / ".parts.json.unfinished"

    import checkpoint_tools.condense.experts as module

    searched = []
    search = module.greedy

    def stopped(candidates: Candidates, *rest: Any, **options: Any) -> Choice:
        searched.append(candidates.where)
        if searched == ["layer 1", "layer 2"]:
            raise KeyboardInterrupt
        return search(candidates, *rest, **options)

    monkeypatch.setattr(module, "greedy", stopped)
    head = open_source(model).tensors["head.weight"].clone()
    parts = (*given, "--out", tmp_path / "parts.json")
    assert run_tool(*parts, "--experts", 3) != 0
    assert left.exists()
    assert not (tmp_path / "parts.json").exists()
    assert run_tool(*parts, "--experts", 2, "--resume") == 2
    assert "is of another model, text, or other options" in capsys.readouterr().err
    times = (model / "model.safetensors").stat()
    edit_weights(model, lambda tensors: tensors["lm_head.weight"].add_(1))  # a model that was changed where it lies
    assert run_tool(*parts, "--experts", 3, "--resume") == 2
    assert "is of another model, text, or other options" in capsys.readouterr().err
    edit_weights(model, lambda tensors: tensors["lm_head.weight"].copy_(head))
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run_tool(*parts, "--experts", 3, "--resume") == 0
    assert searched == ["layer 1", "layer 2", "layer 2", "layer 3"]
    assert not left.exists()
    assert json.loads((tmp_path / "parts.json").read_text()) == whole


def test_experts_that_nobody_chose_are_no_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = condensable(tmp_path, "deepseek"), corpus(tmp_path)
    # One token makes every layer choose three of six experts.
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json", "--max-length", 1,
                    "--max-texts", 1) == 0  # fmt: skip
    given = ("condense", "experts", model, "--corpus", text, "--weights", tmp_path / "w.json", "--out", tmp_path / "e")
    assert run_tool(*given, "--experts", 4) == 2
    assert "--experts (4) is more than the 3 experts of layer 0 that any token chose" in capsys.readouterr().err
    assert run_tool(*given, "--experts", 7) == 2
    assert "--experts (7) must be in 0..6, the experts of a layer" in capsys.readouterr().err
    assert run_tool(*given, "--experts", 3) == 0
    counts = read_weights(tmp_path / "w.json", Shape(3, 6, 3)).count_LE
    for layer, experts in enumerate(read_experts(tmp_path / "e", Shape(3, 6, 3), 3)):
        assert sorted(experts) == counts[layer].nonzero()[:, 0].tolist()


def test_an_expert_that_is_not_a_number_is_never_chosen(tmp_path: Path) -> None:
    """It is no token's choice but would be a candidate: its sum poisons no other."""
    folder = condensable(tmp_path, "deepseek")
    source, text = open_source(folder), corpus(tmp_path)
    texts = read_texts(source, [text], 1, 1)
    idle = int((count_weights(source, texts).count_LE[0] == 0).nonzero()[0])
    key = f"model.layers.1.mlp.experts.{idle}.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors[key].fill_(float("nan")))
    weights = torch.full((3, 6), 0.2, dtype=torch.float64)
    found = dict(choose_experts(open_source(folder), texts, weights, 5))
    assert idle not in found[0].experts


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_weights_are_the_least_squares_of_numpy(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of outputs that the plain model in float64 gives, each token weighted by its share."""
    folder, text = condensable(tmp_path, kind, seed=3), corpus(tmp_path)
    source, model = open_source(folder), plain_forward(folder)
    given = ("condense", "experts", folder, "--corpus", text, "--weights", tmp_path / "w.json", "--experts", 3,
             "--max-length", LENGTH, "--out", tmp_path / "e.json", "--fit", tmp_path / "fit.json")  # fmt: skip
    assert run_tool("condense", "weights", folder, "--corpus", text, "--out", tmp_path / "w.json") == 0
    assert run_tool(*given, "--choose", "mass") == 2
    assert "--fit has no effect on --choose mass" in capsys.readouterr().err
    assert run_tool(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    texts = read_texts(source, [text], LENGTH)
    root_N1 = texts.shares.sqrt()[:, None]
    before, after = (read_weights(tmp_path / name, Shape(3, 6, 3)).means for name in ("w.json", "fit.json"))
    for index, ((i, block), choice) in enumerate(zip(moe_blocks(model)[:-1], found, strict=False)):
        original = torch.cat(states(model, texts, i))

        def changed(weights: list[float], experts: list[int], i: int = i, block: Any = block) -> Tensor:
            condense_by_hand(block, experts, weights)
            out = torch.cat(states(model, texts, i))
            restore(block)
            return out

        base = changed([0.0], [0])
        columns = [(root_N1 * (changed([1.0], [e]) - base)).flatten().numpy() for e in choice["experts"]]
        wanted = np.linalg.lstsq(np.stack(columns, axis=1), (root_N1 * (original - base)).flatten().numpy())[0]
        assert choice["fitted"] == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-5)
        assert after[index, choice["experts"]].tolist() == pytest.approx(choice["fitted"])
        others = [e for e in range(6) if e not in choice["experts"]]
        assert after[index, others].tolist() == pytest.approx(before[index, others].tolist())
        split = changed(choice["fitted"], choice["experts"]).split(texts.lengths)
        expected = sum(js_by_hand(a, b) for a, b in zip(original.split(texts.lengths), split, strict=True))
        assert choice["fitted_distance"] == pytest.approx(expected / len(split), rel=1e-3)


def test_rankings_by_popularity(tmp_path: Path) -> None:
    weights = Weights(torch.tensor([[3.0, 4.0, 0.0, 4.0]]).double(), torch.tensor([[30, 10, 0, 20]]))
    assert ranked_experts(weights, "frequency", 2) == [[0, 3]]
    assert ranked_experts(weights, "mass", 3) == [[1, 3, 0]]
    assert ranked_experts(weights, "weight", 4) == [[1, 3, 0, 2]]


@pytest.mark.parametrize(("step", "where"), [("experts", "attention of layer 0"), ("layers", "layer 0")])
def test_an_activation_that_is_not_a_number_is_named(
    step: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word of one text, and then a layer of all."""
    model, text, out = condensable(tmp_path, "deepseek"), corpus(tmp_path), tmp_path / "out.json"
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json") == 0
    more = ("--weights", tmp_path / "w.json", "--experts", 1) if step == "experts" else ("--layers", 1)
    given = ("condense", step, model, "--corpus", text, "--out", out, *more)
    ids = read_texts(open_source(model), [text], None).ids
    edit_weights(
        model, lambda tensors: tensors["model.embed_tokens.weight"][token_of_last_text(ids)].fill_(float("nan"))
    )
    assert run_tool(*given, "--max-length", 96) == 1
    assert f"the output of {where} is not a number in text {len(ids) - 1} of the corpus" in capsys.readouterr().err
    edit_weights(model, lambda tensors: tensors["model.embed_tokens.weight"].nan_to_num_())
    edit_weights(model, lambda tensors: tensors["model.layers.2.self_attn.o_proj.weight"].fill_(float("nan")))
    assert run_tool(*given, "--max-length", 96) == 1
    where = where.replace("0", "2")
    assert f"the output of {where} is not a number in text 0 of the corpus (from 0)" in capsys.readouterr().err
    assert not out.exists()


def _search(rank: int, world_size: int, folder: Path, text: Path, out: Path) -> None:
    import torch.distributed as dist

    source = open_source(folder)
    texts = read_texts(source, [text], LENGTH)
    weights = count_weights(source, texts).means
    found = choose_experts(source, texts, weights, 3, group=dist.group.WORLD, fit=True)
    (out / f"{world_size}-{rank}.json").write_text(
        json.dumps([[c.experts, [*c.distances, *(c.fitted or [])]] for _, c in found])
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_candidates(world_size: int, tmp_path: Path) -> None:
    folder, text = condensable(tmp_path, "qwen"), corpus(tmp_path)
    run_ranks(_search, folder, text, tmp_path, world_size=world_size)
    source = open_source(folder)
    texts = read_texts(source, [text], LENGTH)
    weights = count_weights(source, texts).means
    alone = [choice for _, choice in choose_experts(source, texts, weights, 3, fit=True)]
    for rank in range(world_size):
        found = json.loads((tmp_path / f"{world_size}-{rank}.json").read_text())
        assert [experts for experts, _ in found] == [choice.experts for choice in alone]
        for (_, values), choice in zip(found, alone, strict=True):
            assert values == pytest.approx([*choice.distances, *(choice.fitted or [])], rel=1e-4)
