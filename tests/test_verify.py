"""Whether two folders hold the same model: dense and MoE, Hugging Face and engine, in any pair."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools import convert as converting
from checkpoint_tools.conversion import How
from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from checkpoint_tools.source import open_source
from checkpoint_tools.verify import verify
from ep_engine.errors import Fault
from ep_engine.whole_model import write_model
from tests.small_models import dense_folder, edit_json, edit_weights, moe_checkpoint, routing_tables, run_tool

RULES = ["topk", "group_limited", "c2r", "c2r_grouped"]
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "llama3_rope": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **ROPE}},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


def rewrite(source: Path, out: Path, entry: str, change: Any) -> Path:
    """A copy of an engine checkpoint with one entry changed."""
    model = open_source(source)
    changed = {name: change(tensor) if name == entry else tensor for name, tensor in model.tensors.items()}
    write_model(out, model.config, changed, source=source)
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source", **CONFIGS[name])
    convert(source, tmp_path / "engine")
    found = verify(source, tmp_path / "engine")
    assert found.same, found.sentences()
    assert found.logit_scale is not None
    assert found.logit_scale > 0.1


@pytest.mark.parametrize("gate", ["mlp", "linear"])
@pytest.mark.parametrize("rule", RULES)
def test_exported_logits_are_those_of_the_engine(rule: str, gate: str, dense: Path, tmp_path: Path) -> None:
    engine = moe_checkpoint(tmp_path / "engine", dense, gate=gate, routing=routing_tables(rule))
    export(engine, tmp_path / "hf")
    found = verify(engine, tmp_path / "hf")
    assert found.same, found.sentences()
    convert(tmp_path / "hf", tmp_path / "again")
    assert verify(engine, tmp_path / "again").max_abs_diff == 0.0


def test_a_split_model_with_all_experts_on_is_its_source(dense: Path, tmp_path: Path) -> None:
    moe = moe_checkpoint(tmp_path / "moe", dense)
    export(moe, tmp_path / "hf")
    for folder in (moe, tmp_path / "hf"):
        assert verify(dense, folder, all_experts=True).same
        routed = verify(dense, folder)
        assert not routed.same
        assert routed.config["moe"] == ("dense", "MoE")
    broken = rewrite(moe, tmp_path / "broken", "layers.1.moe.experts.3.w_up", lambda w: w * 1.01)
    found = verify(dense, broken, all_experts=True)
    assert (found.same, found.first_difference) == (False, "layer 1")


def test_a_changed_expert_and_its_layer_are_named(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = moe_checkpoint(tmp_path / "moe", dense)
    broken = rewrite(moe, tmp_path / "broken", "layers.1.moe.experts.3.w_down", lambda w: -w)
    assert run_tool("verify", moe, broken) == 1
    report = capsys.readouterr().out
    assert "layers.1.moe.experts.3.w_down differs" in report
    assert "outputs first differ at layer 1" in report
    assert report.endswith("not the same model\n")


@pytest.mark.parametrize("tie", [True, False])
def test_a_tie_of_two_experts_is_told_from_a_difference(tie: bool, dense: Path, tmp_path: Path) -> None:
    """Two experts of layer 1 score the same, or one of them has other weights; then other tokens are tried, or not."""
    folder = moe_checkpoint(tmp_path / "a", dense, gate="linear")
    router, fifth = "layers.1.moe.router.w_in", torch.tensor([5])
    equal = rewrite(folder, tmp_path / "equal", router, lambda w: w.index_copy(0, fifth, w[3:4]))
    if tie:
        other = rewrite(equal, tmp_path / "b", router, lambda w: w.index_copy(0, fifth, w[5:6] * (1 + 2**-22)))
    else:
        other = rewrite(equal, tmp_path / "b", "layers.1.moe.experts.1.w_up", lambda w: w * 1.1)
    found = verify(equal, other, logits_alone=True)
    assert not found.same  # the tie is there whatever the tokens are
    assert found.first_difference == "layer 1"
    assert found.ties == ([0, 1] if tie else [])
    told = [sentence for sentence in found.sentences() if "two experts score the same to the last digits" in sentence]
    assert len(told) == len(found.ties)


def test_a_difference_too_small_for_the_logits_is_still_found(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "engine")

    def nudge(weight: torch.Tensor) -> torch.Tensor:
        changed = weight.clone()
        changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(torch.inf))
        return changed

    nudged = rewrite(tmp_path / "engine", tmp_path / "nudged", "layers.0.ffn.w_up.weight", nudge)
    found = verify(dense, nudged)
    assert (found.same, found.first_difference, found.different) == (False, None, ["layers.0.ffn.w_up.weight"])


def test_embedding_and_head_differences_are_placed(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "engine")
    for entry, place in {"embed.weight": "embedding", "head.weight": "logits", "norm.weight": "logits"}.items():
        changed = rewrite(tmp_path / "engine", tmp_path / entry, entry, lambda w: w * 1.1)
        found = verify(dense, changed)
        assert (found.first_difference, found.different) == (place, [entry])


def test_missing_entries_and_other_settings_are_named(dense: Path, tmp_path: Path) -> None:
    other = dense_folder(tmp_path / "other", num_hidden_layers=1, rms_norm_eps=1e-5)
    found = verify(dense, other)
    assert not found.same
    assert found.config == {"num_layers": (2, 1), "rms_norm_eps": (1e-6, 1e-5)}
    assert "layers.1.ffn.w_up.weight" in found.missing
    assert verify(other, dense).extra == found.missing
    bigger = dense_folder(tmp_path / "bigger", vocab_size=80)
    assert verify(dense, bigger).max_abs_diff is None


def test_another_dtype_is_another_model(dense: Path, tmp_path: Path) -> None:
    half = dense_folder(tmp_path / "half", dtype=torch.bfloat16)
    found = verify(dense, half)
    assert not found.same
    assert len(found.different) == len(open_source(dense).tensors)


def test_logits_that_are_no_numbers_are_never_the_same(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    edit_weights(source, lambda t: t["lm_head.weight"][0].fill_(float("nan")))
    with pytest.raises(Fault, match=r"outputs first differ at logits, .* check the source's weights for NaN"):
        convert(source, tmp_path / "engine")
    converting.prepare(source, tmp_path / "engine").run(How(check_logits=False))
    found = verify(source, tmp_path / "engine")
    assert (found.same, found.max_abs_diff) == (False, float("inf"))


def test_json_report(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(dense, tmp_path / "engine")
    assert run_tool("verify", dense, tmp_path / "engine", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same"] is True
    assert report["max_abs_diff"] <= 1e-5 * report["logit_scale"]


def test_a_routing_rule_that_differs_is_named(dense: Path, tmp_path: Path) -> None:
    tables = routing_tables("c2r")
    a = moe_checkpoint(tmp_path / "a", dense, routing=tables)
    b = moe_checkpoint(tmp_path / "b", dense, routing=tables)
    edit_json(b / "model.json", lambda model: model["moe"]["routing"].update(top_t=1))
    found = verify(a, b)
    assert (found.same, list(found.config)) == (False, ["moe.routing.top_t"])
