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
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, read_model_config
from ep_engine.output import whole_file

_SCANNED = 1 << 26  # tokens of a file that says nothing of itself: about a second


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
    about = _read_about(prefix)
    if about is not None and about["vocabulary"] != hash_of_vocabulary(vocabulary):
        made_by = about["tokenizer"]
        raise UserError(
            f"token file {prefix}.bin was made with another vocabulary ({made_by}) than that of {tokenizer}; tokenise "
            "the text again with the tokenizer of the model"
        )


def check_text(tokens: TokenFile, model: Path, vocab_size: int) -> None:
    """Whether a token file is for a model, before anything is computed.

    Ids are known from PREFIX.json; of a file without one the first 2^26 tokens are looked through, and the others as
    they are read.

    Raises:
        UserError: it was made with another vocabulary than that of the tokenizer in the model's folder, or holds an id
            outside [0, vocab_size).
    """
    prefix, folder = tokens.bin_path.with_suffix(""), tokenizer_folder(model)
    vocabulary = read_vocabulary(folder) if folder else None
    if folder is not None and vocabulary is not None:
        check_token_file(prefix, vocabulary, folder)
    check_ids(tokens, vocab_size)


def check_ids(tokens: TokenFile, vocab_size: int) -> None:
    """UserError if a token file is known to hold an id outside [0, vocab_size); see `check_text`."""
    about = _read_about(tokens.bin_path.with_suffix(""))
    largest = None if about is None else about.get("largest_id")
    if largest is None or not 0 <= largest < vocab_size:  # looked through, a file says where the id is
        tokens.count_ids(vocab_size, most=_SCANNED if largest is None else None)


def _read_about(prefix: Path) -> dict[str, Any] | None:
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = about["tokenizer"], about["vocabulary"], int(about.get("largest_id") or 0)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not say whose ids {prefix}.bin holds; tokenise again, or delete it") from None
    return about
