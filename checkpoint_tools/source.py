"""A model folder of any kind, seen as a ModelConfig and the engine's entries."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoint_tools.families import family_of_config
from checkpoint_tools.family import Family
from checkpoint_tools.hf_directory import HFDirectory, open_hf_directory, read_json
from ep_engine.checkpoint import read_model
from ep_engine.entries import expected_entries
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig

# Buffers that old versions of transformers saved; the engine computes them from config.json.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# Key of ModelConfig.carried under which generation_config.json travels; no config.json has it.
GENERATION = "generation_config"


@dataclass(frozen=True)
class Source:
    """An opened model: its configuration and all of its weights, in their stored dtypes."""

    folder: Path
    kind: Literal["huggingface", "engine"]
    family: Family | None  # of a Hugging Face folder
    config: ModelConfig
    tensors: Mapping[str, Tensor]


def open_source(folder: Path) -> Source:
    """Open a Hugging Face folder or an engine checkpoint.

    Raises:
        UserError: `folder` is neither, or is not complete; a tensor is missing, unknown or has another shape than
            config.json says.
        Fault: an entry of an engine checkpoint does not have the checksum it was saved with.
    """
    if (folder / "model.json").is_file():
        config, entries = read_model(folder)
        return Source(folder, "engine", None, config, dict(entries))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is neither a Hugging Face model folder (no config.json) nor an engine checkpoint (no "
            "model.json); give one of the two"
        )
    hf = open_hf_directory(folder)
    where = str(folder / "config.json")
    family = family_of_config(hf.config, where)
    config = family.read_config(hf.config, where)
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        config = config.model_copy(update={"carried": {**config.carried, GENERATION: generation}})
    _check_count(hf, config, where)
    keys = family.keys(config)
    _check_keys(hf, config, keys, tied_head=family.names(config)["head"] + ".weight")
    return Source(folder, "huggingface", family, config, {entry: hf.tensor(key) for entry, key in keys.items()})


def check_apart(source: Path, out: Path) -> None:
    """UserError if writing `out` would replace the source or a folder that holds it."""
    here, there = source.resolve(), out.resolve()
    if there == here or there in here.parents:
        raise UserError(f"output {out} would replace the source {source}; choose another folder")


def _check_count(hf: HFDirectory, config: ModelConfig, where: str) -> None:
    """Refuse absurd sizes before a list as long as they say is made."""
    least = config.num_layers * (config.moe.num_experts if config.moe else 1)
    if least > len(hf.shard_of):
        experts = f" of {config.moe.num_experts} experts" if config.moe else ""
        raise UserError(
            f"{where} speaks of {config.num_layers} layers{experts}, but "
            f"the weight files hold only {len(hf.shard_of)} tensors; the two do not belong together"
        )


def _check_keys(hf: HFDirectory, config: ModelConfig, keys: Mapping[str, str], *, tied_head: str) -> None:
    """Every key expected and of the right shape, and no other."""
    shapes = expected_entries(config)
    wanted = {key: shapes[entry] for entry, key in keys.items()}
    missing = [key for key in wanted if key not in hf.shard_of]
    if missing:
        raise UserError(f"{hf.folder} lacks {_some(missing)}; the weight files do not fit config.json")
    extra = [key for key in hf.shard_of if key not in wanted and not _IGNORED.search(key)]
    if extra == [tied_head] and config.tie_embeddings:
        _check_tied(hf, tied_head, keys["embed.weight"])
    elif extra:
        raise UserError(
            f"{hf.folder} holds {_some(extra)}, which config.json has no place for; nothing is skipped silently"
        )
    for key, shape in wanted.items():
        if hf.shape(key) != shape:
            raise UserError(
                f"{key} in {hf.folder} has shape {hf.shape(key)}, config.json says {shape}; correct one of the two"
            )


def _check_tied(hf: HFDirectory, head: str, embed: str) -> None:
    """A tied model may store its head as well, if it is the same."""
    a, b = hf.tensor(head), hf.tensor(embed)
    if a.dtype != b.dtype or not torch.equal(a, b):
        raise UserError(
            f"config.json in {hf.folder} says tie_word_embeddings, but {head} differs from {embed}; set it to false"
        )


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"
