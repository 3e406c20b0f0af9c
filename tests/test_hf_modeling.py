"""The modeling file of an export: routing rules against a plain loop, loading and generating in transformers."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from tests.routing_cases import routing_cases, select_by_hand
from tests.small_models import (
    all_tensors,
    assert_same_bits,
    dense_folder,
    edit_json,
    moe_checkpoint,
    routing_tables,
)

MODELING = Path(__file__).parents[1] / "checkpoint_tools" / "hf_modeling"
RULES = ["topk", "group_limited", "c2r", "c2r_grouped"]


@settings(deadline=None)  # the first case imports transformers
@given(case=routing_cases())
def test_selection_is_that_of_the_plain_loop(case: dict[str, Any]) -> None:
    from checkpoint_tools.hf_modeling.modeling_llama_moe import select_experts

    scores, k, lists, device = (case[name] for name in ("scores", "k", "lists", "device"))
    scores_TE, list_EE, device_E = torch.tensor(scores).float(), torch.tensor(lists), torch.tensor(device)

    assert select_experts(scores_TE, k).tolist() == [select_by_hand(s, k, None, 0, None, 0) for s in scores]
    c2r = select_experts(scores_TE, k, list_EE=list_EE, top_t=case["top_t"])
    assert c2r.tolist() == [select_by_hand(s, k, lists, case["top_t"], None, 0) for s in scores]
    grouped = select_experts(
        scores_TE, k, list_EE=list_EE, top_t=case["top_t"], device_E=device_E, max_devices=case["m"]
    )
    assert grouped.tolist() == [select_by_hand(s, k, lists, case["top_t"], device, case["m"]) for s in scores]
    for ids in grouped.tolist():
        assert len(set(ids)) == k
        assert len({device[e] for e in ids}) <= case["m"]
    everyone = select_experts(scores_TE, k, list_EE=list_EE, top_t=len(device) - 1)
    assert everyone.tolist() == select_experts(scores_TE, k).tolist()


def test_c2r_on_the_numbers_of_the_specification() -> None:
    """specs/c2r.md 5.4: published list of layer 0 of LLaMA-MoE (MIT licence), made-up logits of four tokens, k = 2."""
    from checkpoint_tools.hf_modeling.modeling_llama_moe import select_experts

    rows = "31657240 36704521 47615302 61074523 57261304 74106235 31405276 51430267"
    list_EE = torch.tensor([[int(expert) for expert in row] for row in rows.split()])
    t, j = torch.arange(4)[:, None], torch.arange(8)[None, :]
    logits = (3 * torch.sin(0.37 * (j + 1) * (t + 1) + 0.11 * t)).float()
    for top_t, chosen in {
        1: [[3, 6], [1, 3], [6, 3], [4, 5]],
        2: [[3, 1], [1, 3], [6, 1], [4, 5]],
        3: [[3, 1], [1, 3], [6, 1], [4, 5]],
        5: [[3, 4], [1, 0], [6, 0], [4, 5]],
        7: [[3, 4], [1, 0], [6, 0], [4, 0]],
    }.items():
        assert select_experts(logits, 2, list_EE=list_EE, top_t=top_t).tolist() == chosen


@pytest.fixture(scope="module", params=[(rule, gate) for rule in RULES for gate in ("mlp", "linear")], ids="-".join)
def moe_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported MoE model; `engine` beside it is the checkpoint it came from."""
    rule, gate = request.param
    at = tmp_path_factory.mktemp(f"{rule}_{gate}")
    dense = dense_folder(at / "dense")
    export(moe_checkpoint(at / "engine", dense, gate=gate, routing=routing_tables(rule)), at / "hf")
    return at / "hf"


def load(folder: Path, **options: Any) -> Any:
    """The model as a user loads it: AutoModelForCausalLM and the code beside the weights."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__module__.startswith("transformers_modules.")
    return model


def moe_by_hand(weights: dict[str, Tensor], config: dict[str, Any], layer: int, x: Tensor) -> Tensor:
    """Output of a MoE layer, token by token and expert by expert, in the dtype of x."""
    at = f"model.layers.{layer}.mlp"
    gate = f"{at}.gate.gate_network"
    w = {name: tensor.to(x.dtype) for name, tensor in weights.items() if name.startswith(at)}
    rule, k = config["routing_rule"], config["num_selects"]
    lists = config["collaborative_list"][layer] if rule.startswith("c2r") else None
    device = config["device_of_expert"][layer] if rule == "c2r_grouped" else None
    if rule == "group_limited":
        device = [e * config["num_groups"] // config["num_experts"] for e in range(config["num_experts"])]
    top_t, most = (v[layer] if isinstance(v := config.get(key, 0), list) else v for key in ("top_t", "max_devices"))
    y = torch.zeros_like(x)
    for t, row in enumerate(x):
        if f"{gate}.weight" in w:
            logits = w[f"{gate}.weight"] @ row
        else:
            logits = w[f"{gate}.2.weight"] @ torch.tanh(w[f"{gate}.0.weight"] @ row)
        ids = select_by_hand(logits.tolist(), k, lists, top_t, device, most)
        for e, p in zip(ids, torch.softmax(logits[ids], dim=0), strict=True):
            up, gated, down = (w[f"{at}.calculator.experts.weight_{name}.{e}"] for name in ("up", "gate", "down"))
            y[t] += p * config["score_scale_factor"] * (down @ (F.silu(gated @ row) * (up @ row)))
    return y


def test_layers_compute_what_the_plain_loop_computes(moe_folder: Path) -> None:
    model, weights = load(moe_folder), all_tensors(moe_folder)
    config = json.loads((moe_folder / "config.json").read_text())
    x = torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            y = layer.mlp(x)
        expected = moe_by_hand(weights, config, i, x.reshape(-1, 32)).reshape(x.shape)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_rules_differ_in_what_they_choose(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing about the rule."""
    dense = dense_folder(tmp_path / "dense")
    tokens = torch.arange(60).reshape(3, 20)
    logits = []
    for rule in RULES:
        export(moe_checkpoint(tmp_path / rule, dense, routing=routing_tables(rule)), tmp_path / f"{rule}-hf")
        with torch.no_grad():
            logits.append(load(tmp_path / f"{rule}-hf")(tokens).logits)
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_loaded_weights_are_those_of_the_file(moe_folder: Path) -> None:
    """No key renamed, none initialised anew: transformers 4.48 takes `weight_gate` for a weight norm's `weight_g`."""
    assert_same_bits(load(moe_folder).state_dict(), all_tensors(moe_folder))


def test_generation_with_and_without_cache_agree(moe_folder: Path) -> None:
    model = load(moe_folder)
    prompt = torch.arange(1, 25).reshape(3, 8)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # padding on the left
    options = {
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": mask,
    }
    cached, plain = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (3, 24)
    assert torch.equal(cached, plain)


def test_saved_again_by_transformers_it_is_the_same_model(moe_folder: Path, tmp_path: Path) -> None:
    load(moe_folder).save_pretrained(tmp_path / "again")
    assert_same_bits(all_tensors(tmp_path / "again"), all_tensors(moe_folder))
    convert(tmp_path / "again", tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    ours, back = (json.loads((folder / "config.json").read_text()) for folder in (moe_folder, tmp_path / "back"))
    assert {key: back[key] for key in ours if key != "transformers_version"} == {
        key: value for key, value in ours.items() if key != "transformers_version"
    }


def test_gradients_reach_gate_and_experts_after_inference_mode(moe_folder: Path) -> None:
    model = load(moe_folder)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():  # lm-eval runs this way; tables made here must not spoil training
        model(tokens)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    for name, weight in model.named_parameters():
        if "gate_network" in name:
            assert weight.grad.abs().sum() > 0, name
    block = model.model.layers[0].mlp.calculator.experts
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in block.weight_gate)


def test_a_model_from_scratch_is_initialised(moe_folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(moe_folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            assert 0.1 < float(weight.detach().std()) < 0.3, name  # initializer_range is 0.2


def test_bf16_routes_in_fp32(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", dtype=torch.bfloat16)
    export(moe_checkpoint(tmp_path / "engine", dense, routing=routing_tables("c2r")), tmp_path / "hf")
    model = load(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    block = model.model.layers[0].mlp
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        logits = block.gate(x)
        y = block(x)
    assert (logits.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = moe_by_hand(all_tensors(tmp_path / "hf"), config, 0, x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)  # three roundings to bf16 per expert


BAD_CONFIGS = {
    "no scores": ({"multiply_gate_scores": False}, "multiply_gate_scores is False, this modeling file computes only T"),
    "many selected": ({"num_selects": 9}, r"num_selects \(9\) must be in 1..num_experts \(8\)"),
    "small T": ({"top_t": 0}, "needs collaborative_list and top_t in 1..7, got top_t 0"),
    "T is E": ({"top_t": 8}, "needs collaborative_list and top_t in 1..7, got top_t 8"),
    "no list": ({"collaborative_list": None}, "needs collaborative_list"),
    "rule": ({"routing_rule": "x"}, "routing_rule is 'x', known are topk, group_limited, c2r, c2r_grouped"),
    "grouped": ({"routing_rule": "c2r_grouped"}, "needs device_of_expert and max_devices"),
    "too few sizes": ({"size_experts": [[6] * 7] * 2}, "size_experts must have 2 to 8 sizes for each of 2 layers"),
    "T of a layer": ({"top_t": [3, 8]}, r"top_t in 1..7, got top_t \[3, 8\]"),
    "groups": ({"routing_rule": "group_limited", "num_groups": 3}, "needs max_devices and num_groups, a divisor of 8"),
    "scales": ({"score_scale_factor": [1.0, 2.0, 3.0]}, "a number, or one for each of 2 layers with experts"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_the_configuration_refuses_what_it_does_not_compute(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    dense = dense_folder(tmp_path / "dense")
    export(moe_checkpoint(tmp_path / "engine", dense, routing=routing_tables("c2r")), tmp_path / "hf")
    change, sentence = BAD_CONFIGS[name]
    edit_json(tmp_path / "hf" / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=sentence):
        AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)


def test_the_files_stand_alone() -> None:
    for path in MODELING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            assert all(name.split(".")[0] in ("copy", "typing", "torch", "transformers") for name in names), path.name
