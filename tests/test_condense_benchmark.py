"""The condensing benchmark on a tiny random model: sizes, bytes, choices of both searches; and all of its stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.condense import SMOKE, Condensing, model_config, write_new
from benchmarks.condense_curve import Made, arms_of, measure, sizes, speeds
from benchmarks.condense_plot import ORIGINAL, by_arm
from benchmarks.condense_search import compare_searches, search_layers
from checkpoint_tools.condense.published_json import Shape, read_experts
from checkpoint_tools.source import open_source
from ep_engine.data.corpus import encode_files, train_tokenizer
from ep_engine.errors import UserError
from ep_engine.inference.loaded_model import Rule
from ep_engine.inference.scores import Asked, evaluate_checkpoint
from ep_engine.mesh import World
from ep_engine.model_config import read_model_config
from tests.distributed import run_ranks
from tests.texts import VOCABULARY, WORDS, write_documents

TINY = replace(SMOKE, vocab_size=VOCABULARY)
ALL = replace(SMOKE, condensed=(SMOKE.num_layers,))
ARMS = arms_of(2, 2, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("condense")
    # Larger weights than a new model has, whose experts would be as good as equal.
    write_new(folder / "base", model_config(TINY).model_copy(update={"initializer_range": 0.3}))
    train_tokenizer([*WORDS] * 3, VOCABULARY, folder / "base/tokenizer")
    corpus = write_documents(folder / "corpus", 8)
    encode_files(sorted(corpus.iterdir()), folder / "base/tokenizer", folder / "heldout")
    (folder / "models").mkdir()
    return Made(folder / "models", folder / "base", corpus, TINY.sequence_length, 6)


def models_of(made: Made, layers: int) -> dict[str, Path]:
    first = ARMS["E(2+2)"]
    orders = {name: made.order(first if arm.follows else arm, TINY.num_layers) for name, arm in ARMS.items()}
    return {name: made.model(arm, layers, orders[name]) for name, arm in ARMS.items()}


def test_parameters_are_those_of_the_publication(made: Made) -> None:
    """A layer that keeps b of N experts saves (N - b) 3df + Nd; without FFN also the shared ones and a norm."""
    d, f, n = TINY.hidden_size, TINY.expert_hidden_size, TINY.num_experts
    whole, expert = sizes(made.base)["parameters"], 3 * d * f
    saved = {name: whole - sizes(model)["parameters"] for name, model in models_of(made, 2).items()}
    router = n * d
    for name in ("E(2+2)", "E(2+2) fitted", "E(2+2) frequency", "E(2+2) mass"):
        assert saved[name] == 2 * ((n - 2) * expert + router)
    assert saved["E(2+0)"] == 2 * (n * expert + router)
    assert saved["layer drop"] == 2 * ((n + 2) * expert + router + d)
    assert saved["block drop"] == 2 * ((n + 2) * expert + router + 4 * d * d + 2 * d)
    assert saved["merged to 4"] == 2 * ((n - 4) * expert + (n - 4) * d)


def test_both_searches_choose_the_same(made: Made) -> None:
    found = compare_searches(0, made.base, made.corpus, made.weights(), 2, (2, 16))
    assert found["same_choices"]
    assert found["distances_apart"] < 1e-3  # of float32, in which what is subtracted is nearly equal
    assert found["layers_with_same_choices"] == TINY.num_layers
    candidates = TINY.num_experts + TINY.num_experts - 1
    expected = TINY.num_layers * (1 + candidates) - 2 * found["never_chosen"]
    assert found["forward_passes_of_brute_force"] == expected
    assert found["layer_passes"] == 1 + TINY.num_layers  # one each, also of the dense layer
    assert found["forward_passes_ratio"] == expected / TINY.num_layers
    layers = search_layers(0, made.base, made.corpus, made.weights(), found["choices"], (2, 16))
    assert 0 < layers["layer_forwards"] < layers["layer_forwards_of_brute_force"]


def test_arms_differ_in_the_experts_and_weights_that_stay(made: Made) -> None:
    models = models_of(made, 1)
    down = {name: open_source(models[name]).tensors for name in models if name.startswith("E(2+2)")}
    (layer,) = read_model_config(models["E(2+2)"] / "model.json").condensed
    found = {name: tensors[f"layers.{layer}.ffn.w_down.weight"] for name, tensors in down.items()}
    up = {name: tensors[f"layers.{layer}.ffn.w_up.weight"] for name, tensors in down.items()}
    assert torch.equal(up["E(2+2)"], up["E(2+2) fitted"])
    assert not torch.equal(found["E(2+2)"], found["E(2+2) fitted"])
    lists = {one: read_experts(made.lists(2, one), Shape(TINY.num_layers, 8, 2), 2) for one in (None, "mass")}
    assert (lists[None][layer - 1] == lists["mass"][layer - 1]) == torch.equal(up["E(2+2)"], up["E(2+2) mass"])


def _measured(rank: int, world_size: int, models: dict[str, Path], heldout: Path, out: Path) -> None:
    found = measure(rank, models, heldout, (TINY.heldout_batches, TINY.batch_size), 1)
    if rank == 0:
        out.write_text(json.dumps(found))


def test_what_is_measured_of_an_arm(made: Made, tmp_path: Path) -> None:
    models = {ORIGINAL: made.base, **models_of(made, 2)}
    whole = {f"{name}, all": model for name, model in models_of(made, TINY.num_layers).items() if "drop" not in name}
    models |= {name: model for name, model in whole.items() if name.startswith(("E(2+2),", "E(2+0)"))}
    heldout = made.folder.parent / "heldout"
    run_ranks(_measured, models, heldout, tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    sent = {name: one["bytes_per_token"] for name, one in found.items()}
    for name in ("E(2+2)", "E(2+0)", "layer drop", "block drop"):  # of three layers one has experts
        assert 0 < sent[name] < sent[ORIGINAL] / 2
    assert sent["merged to 4"] > sent[ORIGINAL] / 2
    assert sent["E(2+2), all"] == sent["E(2+0), all"] == 0
    tokens = TINY.heldout_batches * TINY.batch_size * TINY.sequence_length
    asked = Asked(dict, None, heldout, TINY.sequence_length, tokens, TINY.batch_size)
    for name, model in models.items():
        alone = evaluate_checkpoint(model, asked, World(), Rule(), 60.0)["heldout"]
        assert alone["tokens"] == tokens
        assert found[name]["heldout_loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert len(found[name]["ms"]) == len(found[name]["ms_apart"]) == 1


def test_speeds_are_compared_round_by_round() -> None:
    """100 tokens; a slow second round meets both, so the speed-up is 2 in each."""
    found = speeds([5.0, 50.0, 5.0], [10.0, 100.0, 10.0], 100)
    assert found["speedup"] == {"median": 2, "min": 2, "max": 2}
    assert found["tokens_per_second"] == {"median": 20_000, "min": 2000, "max": 20_000}


def test_arms_begin_with_the_original() -> None:
    curve = {ORIGINAL: {"x": 0}, "E(2+6), 4": {"x": 2}, "E(2+6), 2": {"x": 1}, "layer drop, 2": {"x": 3}}
    assert by_arm(curve) == {
        "E(2+6)": {0: {"x": 0}, 2: {"x": 1}, 4: {"x": 2}},
        "layer drop": {0: {"x": 0}, 2: {"x": 3}},
    }


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="holds no such benchmark; choose another --out"):
        Condensing(tmp_path, SMOKE).run()
    (tmp_path / "sizes.json").write_text("{}")
    with pytest.raises(UserError, match="holds this benchmark with other sizes; choose another --out, or delete it"):
        Condensing(tmp_path, SMOKE).run()


@pytest.mark.slow
def test_all_stages_and_a_second_call_that_repeats_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = Condensing(out, ALL).run()
    arms = arms_of(2, ALL.top_k, ALL.merged)
    assert list(by_arm(results["curve"])) == list(arms)
    for name, found in results["curve"].items():
        alone = name.startswith("E(") and not arms[name.rpartition(", ")[0]].ranking
        assert found["heldout_loss_tuned"].keys() == ({"all", "condensed"} if alone else {"all"})
    assert (out / "condense.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("summary.json")}
    assert Condensing(out, ALL).run() == results
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("summary.json")} == before
