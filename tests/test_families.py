"""Every family: the engine's logits are those of transformers or of a plain reference; weights come back bit by bit."""

import json
from dataclasses import fields
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from checkpoint_tools.families import FAMILIES, family_of_config, family_of_model
from checkpoint_tools.families.family import REQUIRED
from checkpoint_tools.source import open_source
from checkpoint_tools.verify import verify
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of
from tests.family_cases import (
    CONFIGS,
    DEEPSEEK,
    MOLLAMA,
    family_folder,
    plain_folder,
    plain_model,
    transformers_model,
)
from tests.small_models import all_tensors, assert_same_bits, edit_json, routing_tables, run_tool

TOKENS = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(1))
PLAIN: dict[str, dict[str, Any]] = {
    "deepseek": DEEPSEEK,
    "deepseek_renormalised": {**DEEPSEEK, "norm_topk_prob": True, "first_k_dense_replace": 2},
    "mollama_linear": {**MOLLAMA, "gate_type": "linear"},
    "mollama_mlp": {**MOLLAMA, "gate_type": "mlp", "gating_size": 10},
    "mollama_gmm": {**MOLLAMA, "gate_type": "gmm", "gating_size": 10},
}


@pytest.fixture(scope="module", params=[*CONFIGS, *PLAIN])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder, and the logits that its model has."""
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "hf"
    if name in CONFIGS:
        family_folder(folder, name)
        model = transformers_model(name)
    else:
        plain_folder(folder, PLAIN[name])
        model = plain_model(PLAIN[name])
    with torch.no_grad():
        return folder, model(TOKENS).logits


def engine_logits(folder: Path) -> Tensor:
    """Of the engine's own model with the weights of a folder of either kind."""
    source = open_source(folder)
    model = Decoder(source.config).eval()
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    with torch.no_grad():
        logits: Tensor = model(TOKENS)
    return logits


def test_the_engine_computes_what_the_family_computes(case: tuple[Path, Tensor]) -> None:
    folder, expected = case
    found = engine_logits(folder)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_weights_and_keys_come_back(case: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = case
    edit_json(folder / "config.json", lambda c: c.update(a_key_of_mine=[1, {"b": None}]))
    convert(folder, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    assert_same_bits(all_tensors(folder), all_tensors(tmp_path / "back"))
    before, after = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "back"))
    said_otherwise = {"dtype", "torch_dtype", "transformers_version", "auto_map", "layer_types", "head_dim"}
    said_otherwise |= {key for key in before if key.startswith("rope_")}
    if before["model_type"] == "qwen3_moe":
        said_otherwise.add("num_local_experts")  # which is num_experts in transformers 5
    for key in before.keys() - said_otherwise:
        assert after[key] == before[key], key
    found = verify(folder, tmp_path / "engine")
    assert found.same, found.sentences()
    found = verify(tmp_path / "engine", tmp_path / "back")
    assert found.same, found.sentences()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = family_folder(tmp_path / "hf", name)
    convert(folder, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    models = [AutoModelForCausalLM.from_pretrained(at) for at in (folder, tmp_path / "back")]
    assert type(models[0]) is type(models[1])
    with torch.no_grad():
        torch.testing.assert_close(models[0](TOKENS).logits, models[1](TOKENS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if (f.transformers_class or "").startswith("transformers:")],
                         ids=lambda f: f.name)  # fmt: skip
def test_what_a_missing_key_means_is_what_transformers_says(family: Any) -> None:
    import transformers

    theirs = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))()
    for field in family.fields:
        if field.default is not REQUIRED and field.default is not None:
            assert field.default == getattr(theirs, field.key), field.key
    said = getattr(theirs, "rope_parameters", None) or {"rope_theta": getattr(theirs, "rope_theta", None)}  # 5.x, 4.x
    assert family.rope_theta == said["rope_theta"]


def test_every_family_has_a_name_of_its_own() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert {field.name for field in fields(FAMILIES[0])} >= {"names", "fields", "fixed"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_sixteen_bits_keep_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = transformers_model("qwen2_moe").to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back", shard_bytes=50_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_bits(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, the engine computes only False"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, the engine computes only None"),
    "no biases": ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False, the engine computes only True"),
    "a step of nothing": ("qwen3_moe", {"decoder_sparse_step": 0}, "every 0th layer cannot have experts"),
    "layers of words": ("qwen3_moe", {"mlp_only_layers": ["1"]}, "which says of no layer whether it has experts"),
    "no experts": ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "names every layer of a model with experts"),
    "too many": ("mixtral", {"num_experts_per_tok": 7}, "moe.top_k (7) must be in 1..moe.num_experts (6)"),
    "experts by text": ("mixtral", {"num_local_experts": "6"}, "num_local_experts must be a whole number"),
    "absurd": ("mixtral", {"num_local_experts": 10**12}, "but the weight files hold only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_does_not_compute_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, values, sentence = REFUSED[name]
    folder = family_folder(tmp_path / "hf", family)
    edit_json(folder / "config.json", lambda c: c.update(values))
    assert run_tool("convert", folder, tmp_path / "engine") == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_family_that_cannot_say_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(family_folder(tmp_path / "hf", "qwen3_moe_biased"), tmp_path / "engine")
    for family, sentence in (
        ("mixtral", "MixtralForCausalLM cannot express attention_bias True of the model, it would be read as False"),
        ("qwen2_moe", "Qwen2MoeForCausalLM cannot express attention_bias True of the model, it would be read as 'qkv'"),
        ("llama_moe", "LlamaMoEForCausalLM cannot express qk_norm 'head' of the model, it would be read as None"),
        ("gpt2", "--family (gpt2) is not known, known are llama, mistral"),
    ):
        assert run_tool("export", tmp_path / "engine", tmp_path / "x", "--family", family) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_mollama_is_told_from_llama_by_its_keys() -> None:
    assert family_of_config(MOLLAMA, "x").name == "mollama"
    assert family_of_config({"architectures": ["LlamaForCausalLM"]}, "x").name == "llama"
    assert family_of_model(
        family_of_config(MOLLAMA, "x").read_config({**MOLLAMA, "gate_type": "linear"}, "x")
    ).name == ("mollama")


RULED = ["mixtral", "qwen2_moe", "qwen2_moe_with_dense", "qwen3_moe", "olmoe", "deepseek", "mollama_mlp"]
# Every family under C2R and one other rule: what chooses is the same code for all of them.
OTHER_RULES = cycle(["topk", "group_limited", "c2r_grouped"])


@pytest.mark.parametrize(("rule", "name"), [*product(["c2r"], RULED), *zip(OTHER_RULES, RULED, strict=False)])
def test_our_modeling_file_runs_every_rule_in_transformers(rule: str, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if name == "mixtral":
        model: Any = transformers_model(name, sliding_window=None)
        model.save_pretrained(tmp_path / "hf")
    elif name in CONFIGS:
        family_folder(tmp_path / "hf", name)
    else:
        plain_folder(tmp_path / "hf", PLAIN[name])
    convert(tmp_path / "hf", tmp_path / "engine")
    config = open_source(tmp_path / "engine").config
    assert config.moe is not None
    count, experts = len(config.moe_layers()), config.moe.num_experts
    tables = routing_tables(rule, top_t=config.moe.top_k, num_layers=count, num_experts=experts)
    if rule == "group_limited":
        tables |= {"num_groups": 2, "max_devices": 1 if config.moe.top_k <= experts // 2 else 2}
    weights = "selected" if rule == "c2r" and config.moe.score == "softmax" else "model"
    if rule == "c2r_grouped" and config.moe.score == "softmax":
        weights = "match_plain_mass"
    if rule == "c2r_grouped":
        tables["max_devices"] = 1 if config.moe.top_k <= experts // 2 else 2
    edit_json(tmp_path / "engine" / "model.json", lambda m: m["moe"]["routing"].update(tables, weights=weights))
    ours = name in CONFIGS
    if ours and rule != "topk":
        assert run_tool("export", tmp_path / "engine", tmp_path / "back") == 2  # transformers' own code would ignore it
    export(tmp_path / "engine", tmp_path / "back", our_code=ours)
    assert_same_bits(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))
    found = verify(tmp_path / "engine", tmp_path / "back")
    assert found.same, found.sentences()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits = model(TOKENS).logits
        expected = engine_logits(tmp_path / "engine")
        assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9)
    config_again = open_source(tmp_path / "back").config
    assert config_again.family == config.family
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    if rule.startswith("c2r"):
        assert (written["top_t"], len(written["collaborative_list"])) == (config.moe.top_k, count)


def test_c2r_has_no_effect_where_there_is_only_our_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(family_folder(tmp_path / "hf", "llama"), tmp_path / "engine")
    assert run_tool("export", tmp_path / "engine", tmp_path / "x", "--c2r") == 2
    assert "--c2r has no effect on a model of LlamaForCausalLM" in capsys.readouterr().err
