"""Small models that tests make, the oracle among them: real `transformers` models with random weights."""

import copy
import json
import os
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# transformers copies remote code into a cache, which it looks up when it is first imported; processes of a test
# inherit it from the first one, which deletes it when it ends.
if "HF_MODULES_CACHE" not in os.environ:
    _MODULES_CACHE = tempfile.TemporaryDirectory(prefix="hf_modules_")
    os.environ["HF_MODULES_CACHE"] = _MODULES_CACHE.name

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.cli import app
from checkpoint_tools.split import SplitOptions, split
from ep_engine.command_line import exit_with_sentence

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that every part of the model shows in the logits
}


def dense_folder(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random LlamaForCausalLM as `save_pretrained` writes it; `max_shard_size` in `config` makes shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shards = {key: config.pop(key) for key in ("max_shard_size",) if key in config}
    torch.manual_seed(0)
    # transformers 5 writes into the dictionaries it is given.
    model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy({**SIZES, **config}))).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # transformers initialises them to constants
                weight.normal_(mean=0.5, std=0.2)
    model.save_pretrained(folder, **shards)
    return folder


def moe_checkpoint(folder: Path, dense: Path, *, routing: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """`dense` split into 8 experts, top-2, with another routing rule if given."""
    split(dense, folder, SplitOptions(**{"num_experts": 8, "top_k": 2, **options}))
    if routing:
        edit_json(folder / "model.json", lambda model: model["moe"]["routing"].update(routing))
    return folder


def routing_tables(rule: str, *, top_t: int = 3, num_layers: int = 2, num_experts: int = 8) -> dict[str, Any]:
    """Random tables of a rule for `moe_checkpoint`: two devices for c2r_grouped, one of them per token."""
    if rule == "topk":
        return {"rule": rule}
    if rule == "group_limited":
        return {"rule": rule, "num_groups": 4, "max_devices": 1}
    draw = random.Random(0)
    tables = {"rule": rule, "top_t": top_t, "lists": [random_lists(num_experts, draw) for _ in range(num_layers)]}
    if rule == "c2r_grouped":
        devices = [draw.sample([e % 2 for e in range(num_experts)], num_experts) for _ in range(num_layers)]
        tables |= {"max_devices": 1, "device_of_expert": devices}
    return tables


def random_lists(num_experts: int, draw: random.Random) -> list[list[int]]:
    """[E][E]: row i is a random permutation that ends with i."""
    others = [[j for j in range(num_experts) if j != i] for i in range(num_experts)]
    return [[*draw.sample(row, num_experts - 1), i] for i, row in enumerate(others)]


def edit_json(path: Path, edit: Any) -> None:
    """Change a JSON file in place by a function of its value."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, edit: Any) -> None:
    """Change model.safetensors in place by a function of the dictionary of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file of a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def run_tool(*arguments: object) -> int:
    """Exit status of `python -m checkpoint_tools ...`, run in this process; its output goes where pytest looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["checkpoint_tools", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            exit_with_sentence(app)
    return int(stopped.value.code or 0)
