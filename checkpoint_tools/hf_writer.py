"""Weights of a Hugging Face folder, written tensor by tensor in shards of safetensors with their index.

Format of a shard: the length of a header (8 bytes, little endian), a header in JSON with dtype, shape and place of
every tensor, and their elements one after the other (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ep_engine.deferred import Deferred, Tensors
from ep_engine.direct_file import DirectFile
from ep_engine.draft import Draft
from ep_engine.whole_model import Made, in_files, made_ahead

SHARD_BYTES = 5 * 10**9
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8  # of the first element


def write_weights(
    draft: Draft, tensors: Tensors, shard_bytes: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, int]:
    """Write one file, or shards in the order of the model with an index, as `save_pretrained` names them.

    Shards that the draft has already are not written again.

    Returns:
        The checksum of every key.
    """
    shards = in_files(tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(deferred.num_bytes for deferred in tensors.deferred.values())
        write_json(
            draft.folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    done, sums = 0, dict[str, int]()
    left = [key for name, keys in zip(names, shards, strict=True) if name not in draft.done for key in keys]
    with closing(made_ahead(tensors, left)) as ready:
        for name, keys in zip(names, shards, strict=True):
            described = {key: tensors.deferred[key] for key in keys}
            if name not in draft.done:
                made = islice(ready, len(keys))
                draft.note(name, _write_shard(draft.folder / name, described, made, done, advance))
            sums |= draft.done[name]
            done += sum(one.num_bytes for one in described.values())
            advance(done)
    return sums


def write_json(path: Path, value: Any) -> None:
    """A JSON file as `save_pretrained` writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path,
    described: dict[str, Deferred],
    tensors: Iterator[tuple[str, Made]],
    done: int,
    advance: Callable[[int], None],
) -> dict[str, int]:
    header = json.dumps({"__metadata__": {"format": "pt"}} | _places(described))
    header += " " * (-len(header.encode()) % _ALIGNMENT)
    sums = {}
    with DirectFile(path) as file:
        file.write(len(header.encode()).to_bytes(8, "little") + header.encode())
        for key, made in tensors:
            file.write(made.tensor.view(-1).view(torch.uint8).numpy().data)
            sums[key] = made.checksum
            done += made.tensor.nbytes
            advance(done)
    return sums


def _places(described: dict[str, Deferred]) -> dict[str, Any]:
    places, begin = {}, 0
    for key, deferred in described.items():
        end = begin + deferred.num_bytes
        places[key] = {"dtype": _NAMES[deferred.dtype], "shape": deferred.shape, "data_offsets": [begin, end]}
        begin = end
    return places
