"""Hugging Face folder to engine checkpoint."""

from pathlib import Path

from checkpoint_tools.conversion import How, ToCheckpoint
from checkpoint_tools.source import check_apart, open_source
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig


def convert(source: Path, out: Path, *, overwrite: bool = False) -> ModelConfig:
    """Write what `prepare` prepares; returns what was written."""
    conversion = prepare(source, out)
    conversion.run(How(overwrite=overwrite))
    return conversion.model


def prepare(source: Path, out: Path) -> ToCheckpoint:
    """The model in `source` as an engine checkpoint; weights keep their bits and dtypes.

    Tokenizer files, generation_config.json and the keys of config.json that the engine does not read travel along.

    Raises:
        UserError: `source` is no complete Hugging Face model, or `out` would replace it.
    """
    check_apart(source, out)
    model = open_source(source)
    if model.kind != "huggingface":
        raise UserError(
            f"{source} is an engine checkpoint already; copy it, or turn it into a Hugging Face folder with export"
        )
    return ToCheckpoint(
        source=model, out=out, tool="convert", options={}, config=model.config, tensors=lambda _: model.tensors
    )
