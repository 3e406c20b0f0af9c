"""Engine checkpoint to Hugging Face folder: safetensors, config.json, tokenizer, and modeling files where needed."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.conversion import Conversion, How
from checkpoint_tools.families import family_of_model
from checkpoint_tools.families.family import Family
from checkpoint_tools.families.place import tensors_of_keys
from checkpoint_tools.hf_writer import SHARD_BYTES, write_json, write_weights
from checkpoint_tools.source import GENERATION, check_apart, open_source
from ep_engine.checkpoint import tokenizer_folder
from ep_engine.deferred import Tensors
from ep_engine.draft import Draft
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig
from ep_engine.version import VERSION

MANIFEST = "ep_engine_manifest.json"
_MODELING = Path(__file__).parent / "hf_modeling"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class ToHuggingFace(Conversion):
    """A folder of a family; `written` is its config.json."""

    family: Family
    written: dict[str, Any]
    shard_bytes: int

    def write(self, draft: Draft, tensors: Tensors, advance: Callable[[int], None]) -> None:
        """Write weights, config.json and what lies beside them."""
        sums = write_weights(draft, tensors, self.shard_bytes, advance)
        config, folder = self.source.config, draft.folder
        write_json(folder / "config.json", self.written)
        carried = {key: config.carried[key] for key in _TOKEN_IDS if key in config.carried}
        generation = config.carried.get(GENERATION) or carried
        if generation:
            write_json(folder / "generation_config.json", generation)
        for name in self.family.modeling_files:
            shutil.copy(_MODELING / name, folder / name)
        tokenizer = tokenizer_folder(self.source.folder)
        if tokenizer is not None:
            for file in tokenizer.iterdir():
                shutil.copy(file, folder / file.name)
        checksums = {key: f"{value:016x}" for key, value in sorted(sums.items())}
        manifest = {"version": VERSION, "command": sys.argv, **self.manifest(), "checksums": checksums}
        write_json(folder / MANIFEST, manifest)


def export(
    source: Path,
    out: Path,
    *,
    family: str | None = None,
    our_code: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """Write what `prepare` prepares; returns what was written."""
    conversion = prepare(source, out, family=family, our_code=our_code, shard_bytes=shard_bytes)
    conversion.run(How(overwrite=overwrite))
    return conversion.model


def prepare(
    source: Path,
    out: Path,
    *,
    family: str | None = None,
    our_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> ToHuggingFace:
    """An engine checkpoint as a folder that `transformers.AutoModelForCausalLM` loads.

    A model goes back to the family that it came from. One that was split or upcycled gets the names of LLaMA-MoE v1 and
    our modeling files, so it loads with `trust_remote_code=True` and runs the constrained router.

    Args:
        source: engine checkpoint.
        out: folder to write.
        family: name of another family.
        our_code: write our modeling file, which computes the rules of constrained routing, where transformers has its
            own code; a model with condensed layers gets it without being asked.
        shard_bytes: largest size of a weight file, unless a single tensor is larger.

    Raises:
        UserError: `source` is no complete engine checkpoint, or the family cannot express something of the model.
    """
    check_apart(source, out)
    model = open_source(source)
    if model.kind != "engine":
        raise UserError(f"{source} is a Hugging Face folder already; convert or split it first, or copy it")
    config, chosen = model.config, family_of_model(model.config, family, our_code=our_code)
    carried = {key: value for key, value in config.carried.items() if key != GENERATION}
    written = chosen.write_config(config.model_copy(update={"carried": carried}), _main_dtype(model.tensors))
    keys = tensors_of_keys(chosen.places(config), model.tensors)
    return ToHuggingFace(
        source=model,
        out=out,
        tool="export",
        options={"family": chosen.name, "c2r": our_code, "shard_bytes": shard_bytes},
        tensors=lambda _: keys,
        family=chosen,
        written=written,
        shard_bytes=shard_bytes,
    )


def _main_dtype(tensors: Tensors) -> str:
    """The dtype that most elements have, as config.json spells it."""
    elements: Counter[str] = Counter()
    for deferred in tensors.deferred.values():
        elements[str(deferred.dtype).removeprefix("torch.")] += deferred.num_elements
    return elements.most_common(1)[0][0]
