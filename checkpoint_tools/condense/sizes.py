"""How large a condensed model would be, from a configuration alone: no weights are needed, and none are read."""

from pathlib import Path

import torch

from checkpoint_tools.condense.apply import ApplyOptions, Sizes, sizes
from checkpoint_tools.families import family_of_config
from checkpoint_tools.hf_directory import read_json
from checkpoint_tools.source import open_source
from ep_engine.errors import UserError


def sizes_of(folder: Path, options: ApplyOptions, order: Path | None = None) -> Sizes:
    """Of a folder with a model.json, or with a config.json, whose dtype says the bytes of a parameter, else bfloat16's.

    Raises:
        UserError: there is neither, or there are not so many layers or experts.
    """
    if (folder / "model.json").is_file():
        source = open_source(folder)
        before = sum(one.num_bytes for one in source.tensors.deferred.values())
        count = sum(one.num_elements for one in source.tensors.deferred.values())
        return sizes(source.config, options, order, lambda number: number * before // count)
    where = folder / "config.json"
    if not where.is_file():
        raise UserError(f"{folder} has neither a model.json nor a config.json; give a model's folder")
    given = read_json(where)
    dtype = getattr(torch, str(given.get("dtype") or given.get("torch_dtype") or "bfloat16"), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{where} names a dtype that torch does not know; correct the file")
    config = family_of_config(given, str(where)).read_config(given, str(where))
    return sizes(config, options, order, lambda number: number * dtype.itemsize)
