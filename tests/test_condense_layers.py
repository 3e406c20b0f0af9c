"""Search for layers: the order of a brute force through another model's forward, prefixes, ties, beams, ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.condense.experts import choose_experts
from checkpoint_tools.condense.layers import Instead, Kept, Search, Set, order_layers
from checkpoint_tools.condense.published_json import Shape, write_json, write_weights
from checkpoint_tools.condense.texts import Texts, read_texts
from checkpoint_tools.condense.weights import count_weights
from checkpoint_tools.source import open_source
from ep_engine.errors import Fault
from tests.condense_cases import (
    KINDS,
    LENGTH,
    condensable,
    condense_by_hand,
    corpus,
    js_by_hand,
    moe_blocks,
    plain_forward,
    restore,
)
from tests.distributed import run_ranks
from tests.small_models import run_tool
from tests.test_condense_experts import states


def found_kept(folder: Path, text: Path, count: int, instead: Instead = "condensed") -> tuple[Texts, Kept]:
    source = open_source(folder)
    texts = read_texts(source, [text], LENGTH)
    weights = count_weights(source, texts).means
    lists = [choice.experts for _, choice in choose_experts(source, texts, weights, count)]
    return texts, Kept(lists, weights, instead)


def brute_force(model: Any, texts: Texts, kept: Kept, count: int, beam: int = 1) -> list[int]:
    """specs/cd_moe.md 6, a forward of the whole model for every candidate; the same layers again are none."""
    blocks = [block for _, block in moe_blocks(model)]
    last = len(model.model.layers) - 1
    original = states(model, texts, last)
    orders: list[list[int]] = [[]]
    while len(orders[0]) < count:
        found: dict[frozenset[int], tuple[float, list[int]]] = {}
        for order in ([*order, c] for order in orders for c in range(len(blocks)) if c not in order):
            if frozenset(order) in found:
                continue
            for index in order:
                if kept.instead == "layer-drop":
                    blocks[index].forward = torch.zeros_like
                else:
                    row = kept.experts[index]
                    condense_by_hand(blocks[index], row, kept.weight_LE[index, row].tolist())
            pairs = zip(original, states(model, texts, last), strict=True)
            found[frozenset(order)] = sum(js_by_hand(a, b) for a, b in pairs), order
            for block in blocks:
                restore(block)
        orders = [order for _, order in sorted(found.values())[:beam]]
    return orders[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("count", [0, 2])
def test_the_order_is_that_of_a_brute_force(kind: str, seed: int, count: int, tmp_path: Path) -> None:
    folder = condensable(tmp_path, kind, seed=seed)
    texts, kept = found_kept(folder, corpus(tmp_path, 4), count)
    model = plain_forward(folder)
    search = Search(open_source(folder), texts, kept)
    assert order_layers(search, 3, 3) == brute_force(model, texts, kept, 3)


def test_a_beam_is_that_of_a_brute_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model in which the best layer is not among the best two."""
    folder, text = condensable(tmp_path, "qwen", seed=11, moe_layers=4), corpus(tmp_path, 4)
    texts, kept = found_kept(folder, text, 0)
    model, given = plain_forward(folder), ("condense", "layers", folder, "--corpus", text, "--max-length", LENGTH)
    orders = []
    for beam in (1, 2):
        out = tmp_path / f"{beam}.json"
        assert run_tool(*given, "--layers", 2, "--beam", beam, "--out", out) == 0
        orders.append(json.loads(out.read_text()))
        assert orders[-1] == brute_force(model, texts, kept, 2, beam)
    assert orders[0] != orders[1]


def test_dropped_layers_are_those_of_a_brute_force(tmp_path: Path) -> None:
    folder = condensable(tmp_path, "qwen", seed=3)
    texts, kept = found_kept(folder, corpus(tmp_path, 4), 1, "layer-drop")
    found = order_layers(Search(open_source(folder), texts, kept), 3, 3)
    assert found == brute_force(plain_forward(folder), texts, kept, 3)


def test_a_dropped_block_is_a_model_without_it(tmp_path: Path) -> None:
    folder = condensable(tmp_path, "qwen", seed=2)
    texts, kept = found_kept(folder, corpus(tmp_path, 4), 1, "block-drop")
    model = plain_forward(folder)
    original = states(model, texts, 2)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    pairs = zip(original, states(model, texts, 1), strict=True)
    expected = sum(js_by_hand(a, b) for a, b in pairs) / len(original)
    assert Search(open_source(folder), texts, kept).distances([frozenset([1])])[0] == pytest.approx(expected, rel=1e-3)


def test_a_candidate_runs_again_only_what_is_above_it(tmp_path: Path) -> None:
    folder = condensable(tmp_path, "deepseek", seed=1)  # a dense layer, then three with experts
    texts, kept = found_kept(folder, corpus(tmp_path, 2), 1)
    search = Search(open_source(folder), texts, kept)
    assert search.layer_forwards == 4
    search.distances([frozenset([c]) for c in range(3)])
    # Layer 0 and 1 once for all, but layer 1 condensed too; above, a path for each candidate that has begun.
    assert search.layer_forwards - 4 == 1 + 2 + 3 + 3
    before = search.layer_forwards
    search.distances([frozenset([2, c]) for c in (0, 1)])
    assert search.layer_forwards - before == 1 + 2 + 2 + 2
    alone = [search.distances([frozenset([c])])[0] for c in range(3)]
    # Products of other numbers of rows round differently, and a distance is a small difference of float32 states.
    assert search.distances([frozenset([c]) for c in range(3)]) == pytest.approx(alone, rel=1e-4)


class Told(Search):
    """A search that is told what sets are worth."""

    def __init__(self, worth: Any) -> None:
        self.worth, self.asked = worth, 0

    def distances(self, sets: Any) -> list[float]:
        self.asked += len(sets)
        return [self.worth(one) for one in sets]


def test_ties_go_to_the_smallest_index_and_nan_is_never_chosen() -> None:
    assert order_layers(Told(lambda _: 0.5), 4, 4) == [0, 1, 2, 3]
    assert order_layers(Told(lambda one: float("nan") if 0 in one else 0.5), 4, 3) == [1, 2, 3]
    with pytest.raises(Fault, match="with 4 layers condensed no final hidden state is a number"):
        order_layers(Told(lambda one: float("nan") if 0 in one else 0.5), 4, 4)


def test_a_short_search_is_the_beginning_of_a_long_one() -> None:
    def worth(one: Set) -> float:
        return float(torch.rand(1, generator=torch.Generator().manual_seed(sum(1 << i for i in one))))

    whole = order_layers(Told(worth), 7, 7)
    assert sorted(whole) == list(range(7))
    for count in range(1, 7):
        assert order_layers(Told(worth), 7, count) == whole[:count]


def test_a_beam_finds_what_greed_misses() -> None:
    worth = {(0,): 1.0, (1,): 2.0, (2,): 2.0, (0, 1): 9.0, (0, 2): 9.0, (1, 2): 1.0}
    searches = [Told(lambda one: worth[tuple(sorted(one))]) for _ in range(2)]
    assert order_layers(searches[0], 3, 2) == [0, 1]
    assert order_layers(searches[1], 3, 2, beam=2) == [1, 2]
    assert searches[1].asked == 3 + 3  # 0 then 1 and 1 then 0 are asked for once


def _search(rank: int, world_size: int, folder: Path, text: Path, out: Path) -> None:
    import torch.distributed as dist

    texts, kept = found_kept(folder, text, 2)
    search = Search(open_source(folder), texts, kept, group=dist.group.WORLD)
    (out / f"{rank}.json").write_text(json.dumps([order_layers(search, 3, 3), search.layer_forwards]))


def test_ranks_share_the_candidates(tmp_path: Path) -> None:
    folder, text = condensable(tmp_path, "deepseek", seed=4), corpus(tmp_path)
    texts, kept = found_kept(folder, text, 2)
    alone = Search(open_source(folder), texts, kept)
    order = order_layers(alone, 3, 3)
    run_ranks(_search, folder, text, tmp_path, world_size=2)
    for rank in range(2):
        found, layer_forwards = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == order
        assert layer_forwards < alone.layer_forwards


def test_the_command_writes_the_published_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = condensable(tmp_path, "deepseek"), corpus(tmp_path)
    texts, kept = found_kept(folder, text, 2)
    write_weights(tmp_path / "w.json", count_weights(open_source(folder), texts), Shape(3, 6, 3))
    write_json(tmp_path / "e.json", {str(i): row for i, row in enumerate(kept.experts)})
    files = ("--experts", 2, "--weights", tmp_path / "w.json", "--lists", tmp_path / "e.json")
    given = ("condense", "layers", folder, "--corpus", text, "--max-length", LENGTH)
    assert run_tool(*given, *files, "--layers", 3, "--out", tmp_path / "o.json", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "o.json").read_text()) == found["layers"]
    assert found["layers"] == order_layers(Search(open_source(folder), texts, kept), 3, 3)
    assert len(found["distances"]) == 3
    for more, sentence in (
        ((*files, "--layers", 4), "--layers (4) is more than the 3 layers with experts"),
        (("--experts", 2, "--layers", 1), "--experts 2 needs --weights and --lists"),
        ((*files, "--layers", 1, "--instead", "layer-drop"), "have no effect on --instead layer-drop; leave them out"),
        ((*files[2:], "--layers", 1), "have no effect on --experts 0; leave them out"),
    ):
        assert run_tool(*given, *more, "--out", tmp_path / "x.json") == 2
        assert sentence in capsys.readouterr().err
    few = read_texts(open_source(folder), [text], 1, 1)
    write_weights(tmp_path / "w.json", count_weights(open_source(folder), few), Shape(3, 6, 3))
    write_json(tmp_path / "e.json", {str(i): list(range(6)) for i in range(3)})
    assert run_tool(*given, *files[2:], "--experts", 6, "--layers", 1, "--out", tmp_path / "x.json") == 2
    assert "says that no token chose expert" in capsys.readouterr().err


def test_an_interrupted_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = condensable(tmp_path, "deepseek", seed=1), corpus(tmp_path, 4)
    given = ("condense", "layers", folder, "--corpus", text, "--max-length", LENGTH, "--beam", 2, "--json")
    assert run_tool(*given, "--layers", 3, "--out", tmp_path / "whole.json") == 0
    whole = json.loads(capsys.readouterr().out)
    asked: list[int] = []
    distances = Search.distances

    def stopped(search: Search, sets: Any) -> list[float]:
        asked.append(len(sets[0]))
        if asked == [1, 2]:
            raise KeyboardInterrupt
        return distances(search, sets)

    monkeypatch.setattr(Search, "distances", stopped)
    parts = (*given, "--out", tmp_path / "parts.json")
    assert run_tool(*parts, "--layers", 3) != 0
    assert not (tmp_path / "parts.json").exists()
    assert run_tool(*parts, "--layers", 2, "--resume") == 2
    assert "is of another model, text, or other options" in capsys.readouterr().err
    assert run_tool(*parts, "--layers", 3, "--resume") == 0
    assert asked == [1, 2, 2, 3]
    assert json.loads(capsys.readouterr().out) == {**whole, "written": str(tmp_path / "parts.json")}
    assert not (tmp_path / ".parts.json.unfinished").exists()
