"""Hugging Face folder -> engine checkpoint -> Hugging Face folder, bit for bit; and every way a folder can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_tools.conversion import How
from checkpoint_tools.convert import convert
from checkpoint_tools.convert import prepare as prepare_convert
from checkpoint_tools.export import export
from checkpoint_tools.export import prepare as prepare_export
from checkpoint_tools.families import family_of_config
from checkpoint_tools.source import open_source
from checkpoint_tools.upcycle import UpcycleOptions
from checkpoint_tools.upcycle import prepare as prepare_upcycle
from ep_engine.checkpoint import read_manifest
from ep_engine.deferred import Deferred, Tensors
from ep_engine.draft import Draft
from ep_engine.errors import Fault, UserError
from ep_engine.whole_model import read_model
from tests.small_models import (
    all_tensors,
    assert_same_bits,
    dense_folder,
    edit_json,
    edit_weights,
    moe_checkpoint,
    run_tool,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one_head_each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    # In the form of transformers 4, which 5 reads too and writes as its own.
    "llama3_rope": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "bf16": {"dtype": torch.bfloat16},
    "fp16_in_shards": {"dtype": torch.float16, "max_shard_size": "20KB"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense model to spoil."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_keeps_every_bit_and_the_logits(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = dense_folder(tmp_path / "source", **CONFIGS[name])
    convert(source, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    assert_same_bits(all_tensors(source), all_tensors(tmp_path / "back"))

    tokens = torch.arange(40).reshape(2, 20)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "back")]
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert models[0].dtype == models[1].dtype
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    kept = {"_name_or_path", "transformers_version"}
    configs = [{k: v for k, v in model.config.to_dict().items() if k not in kept} for model in models]
    assert configs[0] == configs[1]


def test_rope_of_transformers_4_and_5_is_read_alike_and_written_for_both(copy: Path, tmp_path: Path) -> None:
    for form in (
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 5e5, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA3_ROPE.items()}},
    ):
        edit_json(copy / "config.json", lambda c, form=form: c.update({"rope_parameters": None, **form}))
        config = open_source(copy).config
        assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3_ROPE)
    convert(copy, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, LLAMA3_ROPE)


def test_pickled_weights_give_the_same_checkpoint(dense: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    tensors = all_tensors(dense)
    names = list(tensors)
    parts = {"pytorch_model-1.bin": names[:7], "pytorch_model-2.bin": names[7:]}
    for file, keys in parts.items():
        torch.save({key: tensors[key] for key in keys}, copy / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(dense, tmp_path / "a")
    convert(copy, tmp_path / "b")
    assert read_manifest(tmp_path / "a")["checksums"] == read_manifest(tmp_path / "b")["checksums"]


def test_what_the_engine_does_not_read_travels_along(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", lambda c: c.update(my_key={"a": [1]}, bos_token_id=5))
    generation = {"bos_token_id": 5, "eos_token_id": [2, 7], "temperature": 0.6}
    (copy / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "tokenizer.model": "m",
        "special_tokens_map.json": "{}",
    }
    for name, text in tokenizer.items():
        (copy / name).write_text(text)
    convert(copy, tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["my_key"], config["bos_token_id"], config["eos_token_id"]) == ({"a": [1]}, 5, 2)
    assert "generation_config" not in config
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == generation
    assert {name: (tmp_path / "back" / name).read_text() for name in tokenizer} == tokenizer


def test_token_ids_of_a_model_born_in_the_engine_reach_generate(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "engine")
    ids = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}
    edit_json(tmp_path / "engine" / "model.json", lambda model: model.update(carried=ids))
    export(tmp_path / "engine", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == ids


def test_rotary_buffers_and_an_equal_tied_head_are_no_extra_keys(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source", tie_word_embeddings=True)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(source, add)
    convert(source, tmp_path / "engine")
    assert "head.weight" not in dict(read_model(tmp_path / "engine")[1])


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _index(folder: Path, file: str) -> None:
    weight_map = dict.fromkeys(all_tensors(folder), file)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _index_with(folder: Path, key: str | None) -> None:
    """An index that names `key` besides, or lacks one."""
    _index(folder, "model-1.safetensors")
    changed = {key: "model-1.safetensors"} if key else {}

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] = (index["weight_map"] if key else {"lm_head.weight": "model-1.safetensors"}) | changed

    edit_json(folder / "model.safetensors.index.json", edit)


def _pickle_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": os.system}, folder / "pytorch_model.bin")


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def _weights(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, edit)


def _swapped_length(folder: Path) -> None:
    """As a machine of the other byte order would write it: the length of the header, and all elements."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    body = np.frombuffer(data[8 + length :], np.float32).byteswap().tobytes()
    (folder / "model.safetensors").write_bytes(data[7::-1] + data[8 : 8 + length] + body)


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "neither a Hugging Face model folder .* nor an engine checkpoint",
    ),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights, expected one of model.safetensors"),
    "truncated": (_cut, "model.safetensors is truncated or damaged"),
    "another byte order": (_swapped_length, "model.safetensors is truncated or damaged"),
    "missing shard": (lambda f: _index(f, "model-2.safetensors"), "shard .*model-2.safetensors is missing"),
    "index points outside": (
        lambda f: _index(f, "../model.safetensors"),
        "points to '../model.safetensors', .* outside",
    ),
    "index is absolute": (lambda f: _index(f, "/model.safetensors"), "points to '/model.safetensors', .* outside"),
    "index names too much": (
        lambda f: _index_with(f, "x.weight"),
        "says that .*model-1.safetensors holds x.weight, but",
    ),
    "index names too little": (lambda f: _index_with(f, None), "model-1.safetensors holds .*, but .* does not say so"),
    "pickle with code": (_pickle_code, "pytorch_model.bin is truncated, damaged or holds more than tensors"),
    "missing key": (_weights(lambda t: t.pop(Q)), f"lacks {Q}; "),
    "extra key": (_weights(lambda t: t.update(extra=torch.ones(1))), "holds extra, which config.json has no place for"),
    "other shape": (
        _weights(lambda t: t.update({Q: torch.ones(32, 8)})),
        rf"{Q} .* shape \(32, 8\), .* says \(32, 32\)",
    ),
    "integers": (_weights(lambda t: t.update({Q: torch.ones(32, 32).char()})), f"{Q} .* has dtype I8"),
    "config disagrees": (_config(hidden_size=16), r"embed_tokens.weight .* has shape \(64, 32\), .* says \(64, 16\)"),
    "absurd number of layers": (_config(num_hidden_layers=10**15), "speaks of 1000000000000000 layers, but .* only 21"),
    "other head though tied": (
        _config(tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "other architecture": (
        _config(architectures=["GPT2LMHeadModel"]),
        r"architectures is \['GPT2LMHeadModel'\], known are",
    ),
    "other activation": (_config(hidden_act="gelu"), "hidden_act is 'gelu', the engine computes only 'silu'"),
    "other rope": (_config(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn' is not known"),
    "rope lacks a value": (
        _config(rope_parameters={"rope_type": "linear"}),
        "factor must be a positive number .* got None",
    ),
    "size missing": (_config(hidden_size=None), "has no hidden_size"),
    "size is text": (_config(hidden_size="32"), "hidden_size must be a whole number of at least 1, got '32'"),
    "size is zero": (_config(vocab_size=0), "vocab_size must be a whole number of at least 1, got 0"),
    "eps is not finite": (
        _config(rms_norm_eps=float("nan")),
        "rms_norm_eps must be a number that is not negative, got nan",
    ),
    "heads do not divide": (
        _config(num_attention_heads=6, head_dim=None),
        r"heads \(6\) must divide hidden_size \(32\)",
    ),
    "key heads do not divide": (
        _config(num_key_value_heads=3),
        r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)",
    ),
}


def _swap(deferred: dict[str, Deferred], one: str, other: str) -> None:
    deferred[one], deferred[other] = deferred[other], deferred[one]


def _double(deferred: dict[str, Deferred], one: str, other: str) -> None:
    deferred[one] = deferred[other]


def _change(deferred: dict[str, Deferred], one: str, _: str) -> None:
    old = deferred[one]
    deferred[one] = replace(old, make=lambda: torch.nextafter(old.make(), torch.tensor(9.0)))


@pytest.mark.parametrize("spoil", [_swap, _double, _change])
@pytest.mark.parametrize("tool", ["convert", "export", "upcycle"])
def test_an_expert_that_is_another_in_the_output_is_named(tool: str, spoil: Any, dense: Path, tmp_path: Path) -> None:
    """What our own mistake would do, between the source and the writer."""
    engine, out = moe_checkpoint(tmp_path / "engine", dense), tmp_path / "out"
    export(engine, tmp_path / "hf")
    conversion: Any = {
        "convert": lambda: prepare_convert(tmp_path / "hf", out),
        "export": lambda: prepare_export(engine, out),
        "upcycle": lambda: prepare_upcycle(dense, out, UpcycleOptions(6, 2, granularity=2)),
    }[tool]()
    at = "model.layers.1.mlp.calculator.experts.weight_up.{}" if tool == "export" else "layers.1.moe.experts.{}.w_up"
    real = conversion.tensors

    def spoiled(draft: Draft) -> Tensors:
        deferred = dict(real(draft).deferred)
        spoil(deferred, at.format(2), at.format(5))
        return Tensors(deferred)

    with pytest.raises(
        Fault, match=r"^w_up of expert 2 of layer 1 is not that of .*; unless that was changed meanwhile"
    ):
        replace(conversion, tensors=spoiled).run(How())
    assert not out.exists()


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_gets_one_sentence_and_leaves_nothing(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = BAD_FOLDERS[name]
    spoil(copy)
    assert run_tool("convert", copy, tmp_path / "engine") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(UserError, match=sentence):
        raise UserError(message)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_non_empty_output_folder_is_refused_and_kept(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert run_tool("convert", dense, out) == 2
    assert "is not empty (1 entries); choose another or pass --overwrite" in capsys.readouterr().err
    assert (out / "mine").read_text() == "kept"
    assert run_tool("convert", dense, out, "--overwrite") == 0
    assert not (out / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_the_source_is_never_replaced(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (copy, tmp_path):
        assert run_tool("convert", copy, out, "--overwrite") == 2
        assert "would replace the source" in capsys.readouterr().err
    assert open_source(copy).kind == "huggingface"


def test_the_wrong_direction_is_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(dense, tmp_path / "engine")
    assert run_tool("convert", tmp_path / "engine", tmp_path / "x") == 2
    assert "is an engine checkpoint already" in capsys.readouterr().err
    assert run_tool("export", dense, tmp_path / "x") == 2
    assert "is a Hugging Face folder already" in capsys.readouterr().err


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "checkpoint_tools", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{tmp_path} is neither")
    assert "Traceback" not in done.stderr


def test_usage_errors_are_sentences_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("convert") == 2
    assert capsys.readouterr().err == "Missing argument 'source'; see --help\n"


def test_inspect_counts_and_lists(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(dense, tmp_path / "engine")
    reports = []
    for folder in (dense, tmp_path / "engine"):
        assert run_tool("inspect", folder, "--json") == 0
        reports.append(json.loads(capsys.readouterr().out))
    a, b = reports
    assert (a["kind"], b["kind"]) == ("huggingface", "engine")
    assert a["entries"] == b["entries"]
    assert a["num_parameters"] == a["num_active_parameters"] == sum(t.numel() for t in all_tensors(dense).values())
    assert a["entries"]["layers.0.ffn.w_down.weight"]["shape"] == [32, 48]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_config_json_is_read_or_refused(dense: Path, data: st.DataObject) -> None:
    config = json.loads((dense / "config.json").read_text())
    moe = {"architectures": ["LlamaMoEForCausalLM"], "gate_add_noise": False, "num_experts": 8, "num_selects": 2}
    config |= data.draw(st.sampled_from([{}, moe]))
    moe_keys = ["size_experts", "score_scale_factor", "top_t", "collaborative_list", "routing_rule", "gate_network"]
    key = data.draw(st.sampled_from([*config, "rope_theta", "rope_scaling", *moe_keys]))
    config[key] = data.draw(json_values)
    with suppress(UserError):
        family_of_config(config, "config.json").read_config(config, "config.json")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(dense: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray((dense / "model.safetensors").read_bytes())
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for at in data.draw(st.lists(st.integers(0, header_bytes - 1), max_size=3)):
        whole[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole), header_bytes // 2, header_bytes, len(whole) - 1, 3, 0]))
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    shutil.copy(dense / "config.json", folder)
    (folder / "model.safetensors").write_bytes(whole[:cut])
    with suppress(UserError):
        open_source(folder)
