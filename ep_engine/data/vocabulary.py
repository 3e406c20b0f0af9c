"""Which vocabulary a token file, a tokenizer and a checkpoint have, so that ids of one are not read as another's.

`ep-engine tokenize` leaves PREFIX.json beside a token file, which says whose ids it holds. Files of Megatron have none,
and then nothing is compared but the range of ids.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ep_engine.checkpoint import tokenizer_folder
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, read_model_config
from ep_engine.output import whole_file


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Tokens and ids of a tokenizer's folder; None if it has no tokenizer.json.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise UserError(f"tokenizer folder {folder} cannot be read ({error}); write it again") from None
    return vocabulary


def hash_of_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """sha256 over tokens and ids."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def write_about(prefix: Path, about: Mapping[str, Any]) -> None:
    """Write PREFIX.json of a token file."""
    with whole_file(Path(f"{prefix}.json")) as beside:
        beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: Path, vocabulary: Mapping[str, int], checkpoint: Path) -> None:
    """UserError if texts encoded by a tokenizer are none for a checkpoint."""
    check_range(tokenizer, vocabulary, read_model_config(checkpoint / "model.json"), f"checkpoint {checkpoint} has")
    own = tokenizer_folder(checkpoint)
    theirs = read_vocabulary(own) if own else None
    if theirs is not None and theirs != vocabulary:
        differing = len(set(theirs.items()) ^ set(vocabulary.items()))
        raise UserError(
            f"tokenizer {tokenizer} ({len(vocabulary)} tokens) is not that of checkpoint {checkpoint} ({len(theirs)}): "
            f"{differing} tokens or ids differ; use {own}"
        )


def check_range(tokenizer: Path, vocabulary: Mapping[str, int], model: ModelConfig, what: str) -> None:
    """UserError if a tokenizer has ids that a model has not."""
    largest = max(vocabulary.values())
    if largest >= model.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer} has ids up to {largest}, {what} a vocabulary of {model.vocab_size}; use the "
            "tokenizer that the model was made for"
        )


def check_token_file(prefix: Path, vocabulary: Mapping[str, int], tokenizer: Path) -> None:
    """UserError if a token file says that another vocabulary made it than that of a model's tokenizer."""
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        made_by, theirs = about["tokenizer"], about["vocabulary"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not say whose ids {prefix}.bin holds; tokenise again, or delete it") from None
    if theirs != hash_of_vocabulary(vocabulary):
        raise UserError(
            f"token file {prefix}.bin was made with another vocabulary ({made_by}) than that of {tokenizer}; tokenise "
            "the text again with the tokenizer of the model"
        )
