"""Hugging Face folder to engine checkpoint."""

from pathlib import Path

from checkpoint_tools.source import check_apart, open_source
from ep_engine.checkpoint import write_model
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig
from ep_engine.output import check_output_folder


def convert(source: Path, out: Path, *, overwrite: bool = False) -> ModelConfig:
    """Write the model in `source` as an engine checkpoint; weights keep their bits and dtypes.

    Tokenizer files, generation_config.json and the keys of config.json that the engine does not read travel along.

    Raises:
        UserError: `source` is no complete Hugging Face model, or `out` exists and `overwrite` is not set.
    """
    check_apart(source, out)
    check_output_folder(out, overwrite=overwrite)
    model = open_source(source)
    if model.kind != "huggingface":
        raise UserError(
            f"{source} is an engine checkpoint already; copy it, or turn it into a Hugging Face folder with export"
        )
    write_model(out, model.config, model.tensors, source=source, overwrite=overwrite)
    return model.config
