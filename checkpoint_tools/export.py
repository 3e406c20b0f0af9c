"""Engine checkpoint to Hugging Face folder: safetensors, config.json, tokenizer, and modeling files where needed."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.families import family_of_model
from checkpoint_tools.source import GENERATION, check_apart, open_source
from ep_engine.checkpoint import tokenizer_folder
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig
from ep_engine.output import check_output_folder, whole_folder
from ep_engine.progress import track

_MODELING = Path(__file__).parent / "hf_modeling"
_SHARD_BYTES = 5 * 10**9
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(source: Path, out: Path, *, overwrite: bool = False, shard_bytes: int = _SHARD_BYTES) -> ModelConfig:
    """Write an engine checkpoint as a folder that `transformers.AutoModelForCausalLM` loads.

    A dense model becomes an ordinary LlamaForCausalLM; a MoE model gets the names of LLaMA-MoE v1 and our modeling
    files, so it loads with `trust_remote_code=True` and runs the constrained router.

    Args:
        source: engine checkpoint.
        out: folder to write.
        overwrite: replace `out` if it is a non-empty folder.
        shard_bytes: largest size of a weight file, unless a single tensor is larger.

    Raises:
        UserError: `source` is no complete engine checkpoint, or `out` exists and `overwrite` is not set.
        Fault: an entry does not have the checksum it was saved with, or the disk is full.
    """
    check_apart(source, out)
    check_output_folder(out, overwrite=overwrite)
    model = open_source(source)
    if model.kind != "engine":
        raise UserError(f"{source} is a Hugging Face folder already; convert or split it first, or copy it")
    config, family = model.config, family_of_model(model.config)
    tensors = {key: model.tensors[entry] for entry, key in family.keys(config).items()}
    carried = {key: value for key, value in config.carried.items() if key != GENERATION}
    written = family.write_config(config.model_copy(update={"carried": carried}), _main_dtype(tensors))
    with whole_folder(out, overwrite=overwrite) as draft:
        _write_weights(draft, tensors, shard_bytes)
        _write_json(draft / "config.json", written)
        generation = config.carried.get(GENERATION) or {key: carried[key] for key in _TOKEN_IDS if key in carried}
        if generation:
            _write_json(draft / "generation_config.json", generation)
        for name in family.modeling_files:
            shutil.copy(_MODELING / name, draft / name)
        tokenizer = tokenizer_folder(source)
        if tokenizer is not None:
            for file in tokenizer.iterdir():
                shutil.copy(file, draft / file.name)
    return config


def _main_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype that most elements have, as config.json spells it."""
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return elements.most_common(1)[0][0]


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """One file, or shards in the order of the model with an index, as `save_pretrained` names them."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    for name, shard in track(list(zip(names, shards, strict=True)), "writing weights"):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # what the disk said, but not as an OSError
            raise Fault(
                f"{name} could not be written ({error}); nothing was exported, free space and run again"
            ) from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
