"""Condensed checkpoints: what a plain forward computes, in the engine and transformers; sizes from configurations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.condense.published_json import Shape, Weights, read_weights, write_json, write_weights
from checkpoint_tools.forward import outputs
from checkpoint_tools.inspect import inspect
from checkpoint_tools.source import open_source
from ep_engine.config import RunConfig
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of
from tests.condense_cases import KINDS, PUBLISHED, condensable, condense_by_hand, corpus, moe_blocks, plain_forward
from tests.distributed import run_ranks
from tests.run_cases import small_run, train_here
from tests.run_files import make_files, write_run
from tests.small_models import edit_weights, moe_checkpoint, routing_tables, run_tool
from tests.test_hf_modeling import load
from tests.texts import VOCABULARY, text_model

TOKENS = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
LISTS = [[2, 0, 5], [1, 4, 3], [5, 2, 0]]


def files(folder: Path, model: Path, order: list[int]) -> tuple[Any, ...]:
    """Arguments of `apply`: weights as counted, some lists, and an order."""
    assert run_tool("condense", "weights", model, "--corpus", corpus(folder), "--out", folder / "w.json",
                    "--overwrite") == 0  # fmt: skip
    write_json(folder / "e.json", {str(i): row for i, row in enumerate(LISTS)})
    write_json(folder / "o.json", order)
    return ("--order", folder / "o.json", "--weights", folder / "w.json", "--lists", folder / "e.json")


def by_hand(folder: Path, model: Path, layers: list[int], count: int) -> Any:
    """The plain model with some layers condensed."""
    plain = plain_forward(model, torch.float32)
    means_LE = read_weights(folder / "w.json", Shape(3, 6, 3)).means
    for index in layers:
        experts = LISTS[index][:count]
        condense_by_hand(moe_blocks(plain)[index][1], experts, means_LE[index, experts].tolist())
    return plain


def logits_of(folder: Path) -> Tensor:
    source = open_source(folder)
    return dict(outputs(source.config, source.tensors, TOKENS))["logits"]


def engine_logits(folder: Path) -> Tensor:
    source = open_source(folder)
    model = Decoder(source.config)
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    with torch.no_grad():
        return model(TOKENS)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "experts", "scales"),
    [(1, 2, "folded"), (1, 2, "kept"), (2, 3, "kept"), (2, 0, "folded"), (3, 3, "folded")],
)
def test_a_condensed_checkpoint_computes_what_the_plain_model_does(
    kind: str, layers: int, experts: int, scales: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = condensable(tmp_path, kind)
    given = files(tmp_path, model, [2, 0, 1])
    more = ("--keep-scales",) if scales == "kept" else ()
    given = given if experts else given[:2]
    capsys.readouterr()
    assert run_tool("condense", "apply", model, tmp_path / "small", "--layers", layers, "--experts", experts, *given,
                    *more, "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        wanted = by_hand(tmp_path, model, [2, 0, 1][:layers], experts)(TOKENS).logits
    assert (wanted - plain_forward(model, torch.float32)(TOKENS).logits).abs().max() > 1e-2
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(wanted.abs().max())}
    torch.testing.assert_close(logits_of(tmp_path / "small"), wanted, **tolerance)
    torch.testing.assert_close(engine_logits(tmp_path / "small"), wanted, **tolerance)
    # What was not condensed is as it was; memory falls.
    before, after = open_source(model).tensors, open_source(tmp_path / "small").tensors
    same = [name for name in after if name in before]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert len(after) - len(same) == layers * (3 + (kind == "qwen"))
    assert inspect(tmp_path / "small").num_parameters == told["parameters"]
    assert told["parameters_before"] == inspect(model).num_parameters
    shared, each = {"deepseek": (24, 12), "qwen": (24, 20)}[kind]
    assert told["trainable"] == layers * (shared + experts * each) * 3 * 32
    assert run_tool("convert", model, tmp_path / "whole") == 0
    saved = folder_bytes(tmp_path / "whole") - folder_bytes(tmp_path / "small")
    assert saved > 4 * (told["parameters_before"] - told["parameters"])
    # And in transformers, by our modeling file.
    assert run_tool("export", tmp_path / "small", tmp_path / "hf") == 0
    loaded = load(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, wanted, **tolerance)
    assert sum(p.numel() for p in loaded.parameters()) == told["parameters"]
    assert run_tool("convert", tmp_path / "hf", tmp_path / "back") == 0
    assert run_tool("verify", tmp_path / "small", tmp_path / "back") == 0
    loaded.save_pretrained(tmp_path / "again")
    assert run_tool("verify", tmp_path / "back", tmp_path / "again") == 0


def test_folded_weights_change_only_the_last_matrix(tmp_path: Path) -> None:
    """By hand: rows and columns of the shared expert, then of experts 2 and 0."""
    model = condensable(tmp_path, "deepseek")
    given = files(tmp_path, model, [1])
    assert run_tool("condense", "apply", model, tmp_path / "small", "--layers", 1, "--experts", 2, *given) == 0
    before, after = open_source(model).tensors, open_source(tmp_path / "small").tensors
    means_LE = read_weights(tmp_path / "w.json", Shape(3, 6, 3)).means
    at, to = "layers.2.moe", "layers.2.ffn"
    for name in ("w_gate", "w_up"):
        parts = [before[f"{at}.shared.{name}.weight"], *(before[f"{at}.experts.{e}.{name}"] for e in LISTS[1][:2])]
        assert torch.equal(after[f"{to}.{name}.weight"], torch.cat(parts))
    down = [before[f"{at}.experts.{e}.w_down"] * float(means_LE[1, e]) for e in LISTS[1][:2]]
    assert torch.equal(after[f"{to}.w_down.weight"], torch.cat([before[f"{at}.shared.w_down.weight"], *down], dim=1))


def test_with_a_constant_router_condensing_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = condensable(tmp_path, "deepseek")
    edit_weights(model, lambda tensors: [tensors[f"model.layers.{i}.mlp.gate.weight"].zero_() for i in (1, 2, 3)])
    given, text = ("--weights", tmp_path / "w.json"), corpus(tmp_path)
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "w.json") == 0
    assert run_tool("condense", "experts", model, "--corpus", text, *given, "--experts", 3, "--out",
                    tmp_path / "e.json") == 0  # fmt: skip
    write_json(tmp_path / "o.json", [0, 2])
    capsys.readouterr()
    assert run_tool("condense", "apply", model, tmp_path / "small", "--layers", 2, "--experts", 3, "--order",
                    tmp_path / "o.json", *given, "--lists", tmp_path / "e.json", "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    logits = logits_of(model)
    assert told["logit_gap"] <= 1e-5 * float(logits.abs().max())
    torch.testing.assert_close(logits_of(tmp_path / "small"), logits, rtol=1e-4, atol=1e-4)


def test_dropped_layers_and_blocks(tmp_path: Path) -> None:
    model = condensable(tmp_path, "deepseek")
    write_json(tmp_path / "o.json", [1])
    for instead in ("layer-drop", "block-drop"):
        out = tmp_path / instead
        assert run_tool("condense", "apply", model, out, "--layers", 1, "--instead", instead, "--order",
                        tmp_path / "o.json") == 0  # fmt: skip
        plain = plain_forward(model, torch.float32)
        if instead == "layer-drop":
            moe_blocks(plain)[1][1].forward = torch.zeros_like
        else:
            del plain.model.layers[2]
            plain.config.num_hidden_layers = 3
        with torch.no_grad():
            wanted = plain(TOKENS, use_cache=False).logits
        torch.testing.assert_close(logits_of(out), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine_logits(out), wanted, rtol=1e-4, atol=1e-4)
        assert run_tool("export", out, tmp_path / f"{instead}-hf") == 0
        with torch.no_grad():
            loaded = load(tmp_path / f"{instead}-hf")
            torch.testing.assert_close(loaded(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["topk", "c2r", "c2r_grouped"])
def test_a_split_model_under_a_rule_without_shared_experts(rule: str, tmp_path: Path) -> None:
    dense = text_model(tmp_path)
    moe = moe_checkpoint(tmp_path / "moe", dense, routing=routing_tables(rule))
    text, given = corpus(tmp_path), ("--weights", tmp_path / "w.json")
    for file in (dense / "tokenizer.json", dense / "tokenizer_config.json"):
        (moe / file.name).write_bytes(file.read_bytes())
    assert run_tool("condense", "weights", moe, "--corpus", text, "--out", tmp_path / "w.json") == 0
    assert run_tool("condense", "experts", moe, "--corpus", text, *given, "--experts", 2, "--out",
                    tmp_path / "e.json") == 0  # fmt: skip
    given = (*given, "--lists", tmp_path / "e.json", "--experts", 2)
    assert run_tool("condense", "layers", moe, "--corpus", text, *given, "--layers", 2, "--out",
                    tmp_path / "o.json") == 0  # fmt: skip
    assert run_tool("condense", "apply", moe, tmp_path / "small", "--layers", 1, *given, "--order",
                    tmp_path / "o.json") == 0  # fmt: skip
    before, after = open_source(moe).config, open_source(tmp_path / "small").config
    assert before.moe is not None
    assert after.moe is not None
    first = json.loads((tmp_path / "o.json").read_text())[0]
    assert after.dense_layers == {first: 2 * 6}
    if rule != "topk":
        assert before.moe.routing.lists is not None
        assert after.moe.routing.lists == [before.moe.routing.lists[1 - first]]
    assert run_tool("export", tmp_path / "small", tmp_path / "hf") == 0
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "hf")(TOKENS).logits, engine_logits(tmp_path / "small"),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    # All layers: a dense model of another width.
    assert run_tool("condense", "apply", moe, tmp_path / "dense", "--layers", 2, *given, "--order",
                    tmp_path / "o.json") == 0  # fmt: skip
    config = open_source(tmp_path / "dense").config
    assert (config.moe, config.intermediate_size, config.dense_layers) == (None, 12, {})
    assert run_tool("export", tmp_path / "dense", tmp_path / "dense-hf") == 0
    assert json.loads((tmp_path / "dense-hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_pyramid_is_condensed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of 2 and 4 experts: tables lose the row of the condensed layer, and the largest number with it."""
    dense, text, given = text_model(tmp_path), corpus(tmp_path), ("--weights", tmp_path / "w.json")
    moe, small = tmp_path / "moe", tmp_path / "small"
    assert run_tool("upcycle", dense, moe, "--experts-per-layer", "2,4", "--top-k", 2) == 0
    assert run_tool("condense", "weights", moe, "--corpus", text, "--out", tmp_path / "w.json") == 0
    search = ("condense", "experts", moe, "--corpus", text, *given, "--out", tmp_path / "e.json")
    assert run_tool(*search, "--experts", 3) == 2
    assert "--experts (3) must be in 0..2" in capsys.readouterr().err
    assert run_tool(*search, "--experts", 2) == 0
    write_json(tmp_path / "o.json", [1])
    apply = ("condense", "apply", moe, small, "--layers", 1, "--experts", 2)
    assert run_tool(*apply, "--dry-run") == 2
    assert "2 layers of 2, 4 experts, so its size depends on --order" in capsys.readouterr().err
    apply = (*apply, *given, "--lists", tmp_path / "e.json", "--order", tmp_path / "o.json")
    assert run_tool(*apply, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    config = open_source(small).config
    assert config.moe is not None
    assert (config.moe.num_experts, config.experts_of_layer()) == (2, [2])
    assert inspect(small).num_parameters == told["parameters"]
    torch.testing.assert_close(engine_logits(small), logits_of(small), rtol=1e-4, atol=1e-4)


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


def test_a_condensed_layer_sends_nothing(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Half of the layers with experts: half of the rows that `plan` foretells and the ledger counts."""
    files = make_files(tmp_path / "files")
    write_weights(tmp_path / "w.json", Weights(torch.ones(2, 8).double(), torch.full((2, 8), 8)), Shape(2, 8, 2))
    write_json(tmp_path / "e.json", {"0": [1, 3], "1": [0, 2]})
    write_json(tmp_path / "o.json", [0])
    given = ("--order", tmp_path / "o.json", "--weights", tmp_path / "w.json", "--lists", tmp_path / "e.json")
    assert run_tool("condense", "apply", files / "moe", files / "small", "--layers", 1, "--experts", 2, *given) == 0
    planned, counted = {}, {}
    for name in ("moe", "small"):
        (tmp_path / name).mkdir()
        run_file = write_run(files, tmp_path / name, {"checkpoint": str(files / name)})
        status, out, err = run("plan", run_file, "parallel.expert_parallel_size=2", "--ranks", 2, "--json")
        assert (status, err) == (0, "")
        experts = json.loads(out)["traffic"]["experts"]
        planned[name] = len(experts["layers"]), sum(sum(tiers.values()) for tiers in experts["total"].values())
        config = small_run(files, f"run-{name}", model={"checkpoint": str(files / name)},
                           parallel={"expert_parallel_size": 2})  # fmt: skip
        run_ranks(_train, config, world_size=2)
        last = (config.output.folder / "metrics.jsonl").read_text().splitlines()[-1]
        counted[name] = sum(json.loads(last)["bytes_per_token"].values())  # of both directions
    assert (planned["moe"][0], planned["small"][0]) == (2, 1)
    assert 0 < planned["small"][1] < 0.6 * planned["moe"][1]
    assert 0 < counted["small"] < 0.6 * counted["moe"]


def test_what_cannot_be_condensed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dense = condensable(tmp_path, "qwen"), text_model(tmp_path / "dense")
    given = files(tmp_path, model, [2, 0, 1])
    for source, more, sentence in (
        (model, ("--layers", 4, *given), "--layers (4) must be in 1..3, the model's layers with experts"),
        (model, ("--layers", 0, *given), "--layers (0) must be in 1..3"),
        (model, ("--layers", 1, "--experts", 7, *given), "--experts (7) must be in 0..6, the experts of a layer"),
        (model, ("--layers", 1, "--experts", 4, *given), "has 3 experts, --experts is 4"),
        (model, ("--layers", 1, "--experts", 2, *given[2:]), "--order is missing"),
        (model, ("--layers", 1, "--experts", 2, *given[:2]), "--experts 2 needs --weights and --lists"),
        (model, ("--layers", 3, "--instead", "block-drop", *given[:2]), "would leave no layer"),
        (dense, ("--layers", 1, *given), "the model has no layers with experts"),
    ):
        assert run_tool("condense", "apply", source, tmp_path / "small", *more) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "small").exists()


# specs/cd_moe.md 1 and 9.4: settings that decide parameters, as published.
PUBLISHED_CONFIGS = {
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "qwen": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip
TOTALS = {"deepseek": 16_375_728_128, "qwen": 14_315_784_192}
RATIOS = {
    ("deepseek", 0): (0.8985, 0.7971, 0.6956, 0.5942, 0.4927),
    ("deepseek", 6): (0.9081, 0.8161, 0.7242, 0.6322, 0.5403),
    ("qwen", 0): (0.8912, 0.7824, 0.6736, 0.5648, 0.4560),
    ("qwen", 4): (0.8985, 0.7969, 0.6954, 0.5938, 0.4923),
}
GIB = {0: (27.41, 24.31, 21.22, 18.12, 15.03), 6: (27.70, 24.89, 22.09, 19.28, 16.48)}


@pytest.mark.parametrize(("name", "experts"), RATIOS)
def test_sizes_are_those_of_the_publication(
    name: str, experts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIGS[name]))  # and no weights

    def told(layers: int, *more: object) -> dict[str, Any]:
        given = ("condense", "apply", tmp_path, tmp_path / "out", "--layers", layers, *more, "--dry-run", "--json")
        assert run_tool(*given) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    for number, layers in enumerate((3, 6, 9, 12, 15)):
        found = told(layers, "--experts", experts)
        assert found["parameters_before"] == TOTALS[name]
        assert found["memory_ratio"] == pytest.approx(RATIOS[name, experts][number], abs=5e-5 + 1e-9)
        if name == "deepseek":
            assert found["bytes"] / 2**30 == pytest.approx(GIB[experts][number], abs=5e-3)
    shared = {"deepseek": 2, "qwen": 4}[name]
    assert told(9, "--experts", experts)["trainable"] == 9 * (shared + experts) * 8_650_752  # specs 8
    if name == "deepseek":
        assert told(8)["trainable"] == 138_412_032  # specs 8: 138.4 M of E(2+0)
        lost = {what: 1 - told(1, "--instead", what)["memory_ratio"] for what in ("layer-drop", "block-drop")}
        # An FFN's norm goes with it: 2048 parameters that the published arithmetic leaves.
        assert lost["layer-drop"] == pytest.approx(0.03487, abs=5e-6)
        assert lost["block-drop"] == pytest.approx(0.03590, abs=5e-6)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the data of the published run is not here")
def test_published_files_condense_the_documented_layers(tmp_path: Path) -> None:
    """A model of DeepSeekMoE's counts, but narrow: `apply` takes the published files as they are."""
    wide = {"num_hidden_layers": 28, "n_routed_experts": 64, "num_experts_per_tok": 6, "hidden_size": 8,
            "moe_intermediate_size": 4, "intermediate_size": 8, "num_attention_heads": 2}  # fmt: skip
    model = condensable(tmp_path, "deepseek", **wide)
    lists, weights = (PUBLISHED / name for name in ("layer_idx_to_expert_idx.greedy_jl.json", "dynamic_weight.json"))
    assert run_tool("condense", "apply", model, tmp_path / "small", "--layers", 9, "--experts", 6, "--order",
                    PUBLISHED / "layer_idx_order.e6.json", "--weights", weights, "--lists", lists) == 0  # fmt: skip
    config = open_source(tmp_path / "small").config
    assert sorted(config.condensed) == sorted(i + 1 for i in (19, 15, 22, 10, 12, 6, 14, 21, 26))
    assert {config.dense_layers[i] for i in config.condensed} == {(2 + 6) * 4}
    # specs/cd_moe.md 6, the order of E(2+0).
    e0 = [19, 12, 7, 23, 10, 14, 1, 24, 17, 15, 9, 21, 18, 6, 26]
    write_json(tmp_path / "e0.json", e0)
    assert run_tool("condense", "apply", model, tmp_path / "shared", "--layers", 8, "--order",
                    tmp_path / "e0.json") == 0  # fmt: skip
    assert sorted(open_source(tmp_path / "shared").config.condensed) == sorted(i + 1 for i in e0[:8])
