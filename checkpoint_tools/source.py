"""A model folder of any kind, seen as a ModelConfig and the engine's entries, each read when it is needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoint_tools.families import family_of_config
from checkpoint_tools.families.family import Family
from checkpoint_tools.families.place import Place, shapes_of_keys
from checkpoint_tools.hf_directory import HFDirectory, open_hf_directory, read_json
from ep_engine.checkpoint import hash_of_checksums, read_manifest
from ep_engine.checksum import checksum
from ep_engine.deferred import Deferred, Tensors
from ep_engine.entries import expected_entries
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig
from ep_engine.whole_model import read_model

# Buffers that old versions of transformers saved; the engine computes them from config.json.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# Key of ModelConfig.carried under which generation_config.json travels; no config.json has it.
GENERATION = "generation_config"


@dataclass(frozen=True)
class Source:
    """An opened model: its configuration and all of its weights, in their stored dtypes.

    Attributes:
        checksums: of the entries that have been hashed so far.
    """

    folder: Path
    kind: Literal["huggingface", "engine"]
    family: Family | None  # of a Hugging Face folder
    config: ModelConfig
    tensors: Tensors
    checksums: dict[str, int] = field(default_factory=dict)

    def hashed(self) -> Tensors:
        """The same tensors, of which each is hashed the first time that it is read."""

        def of(name: str, deferred: Deferred) -> Deferred:
            def make() -> Tensor:
                tensor = deferred.make()
                if name not in self.checksums:
                    self.checksums[name] = checksum(tensor)
                return tensor

            return Deferred(deferred.shape, deferred.dtype, make)

        return Tensors({name: of(name, deferred) for name, deferred in self.tensors.deferred.items()})

    def hash(self) -> str:
        """sha256 over the name and checksum of every entry: the same for a Hugging Face folder and its conversion.

        What has not been hashed is read for it; an engine checkpoint knows its checksums.
        """
        if self.kind == "engine":
            kept = read_manifest(self.folder)["checksums"]
            return hash_of_checksums({name: int(kept[name], 16) for name in self.tensors.deferred})
        unread = [name for name in self.tensors if name not in self.checksums]
        self.checksums.update({name: checksum(self.tensors[name]) for name in unread})
        return hash_of_checksums(self.checksums)


def open_source(folder: Path) -> Source:
    """Open a Hugging Face folder or an engine checkpoint.

    Raises:
        UserError: `folder` is neither, or is not complete; a tensor is missing, unknown or has another shape than
            config.json says, or a dtype that the engine has not.
        Fault: when it is read, an entry of an engine checkpoint does not have the checksum it was saved with.
    """
    if (folder / "model.json").is_file():
        config, tensors = read_model(folder)
        return Source(folder, "engine", None, config, tensors)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is neither a Hugging Face model folder (no config.json) nor an engine checkpoint (no "
            "model.json); give one of the two"
        )
    hf = open_hf_directory(folder)
    where = str(folder / "config.json")
    _check_layers(hf, where)
    family = family_of_config(hf.config, where)
    config = family.read_config(hf.config, where)
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        config = config.model_copy(update={"carried": {**config.carried, GENERATION: generation}})
    _check_experts(hf, config, where)
    places, shapes = family.places(config), expected_entries(config)
    _check_keys(hf, config, places, shapes)
    tensors = Tensors({entry: _deferred(hf, place, shapes[entry]) for entry, place in places.items()})
    return Source(folder, "huggingface", family, config, tensors)


def _deferred(hf: HFDirectory, place: Place, shape: tuple[int, ...]) -> Deferred:
    return Deferred(shape, hf.dtype(place.key), lambda: place.to_engine(hf.tensor(place.key), shape))


def check_apart(source: Path, out: Path) -> None:
    """UserError if writing `out` would replace the source or a folder that holds it."""
    here, there = source.resolve(), out.resolve()
    if there == here or there in here.parents:
        raise UserError(f"output {out} would replace the source {source}; choose another folder")


def _check_layers(hf: HFDirectory, where: str) -> None:
    """Refuse an absurd number before a list as long as it says is made."""
    layers = hf.config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(hf.shard_of):
        raise UserError(
            f"{where} speaks of {layers} layers, but the weight files hold only {len(hf.shard_of)} tensors; the two do "
            "not belong together"
        )


def _check_experts(hf: HFDirectory, config: ModelConfig, where: str) -> None:
    """The same for experts: each has tensors of its own, or a part of one of three dims."""
    if config.moe is None:
        return
    least = sum(config.experts_of_layer())
    there = sum(shape[0] if len(shape) == 3 else 1 for shape in map(hf.shape, hf.shard_of))
    if least > there:
        raise UserError(
            f"{where} speaks of {config.num_layers} layers of {config.moe.num_experts} experts, but the weight files "
            f"hold only {there} tensors; the two do not belong together"
        )


def _check_keys(
    hf: HFDirectory, config: ModelConfig, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every key expected and of the right shape, and no other."""
    wanted = shapes_of_keys(places, shapes)
    missing = [key for key in wanted if key not in hf.shard_of]
    if missing:
        raise UserError(f"{hf.folder} lacks {_some(missing)}; the weight files do not fit config.json")
    extra = [key for key in hf.shard_of if key not in wanted and not _IGNORED.search(key)]
    if config.tie_embeddings and extra == ["lm_head.weight"]:
        _check_tied(hf, extra[0], places["embed.weight"].key)
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
