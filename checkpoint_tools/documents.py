"""Documents, and their tokens in blocks.

.txt           a document
.jsonl, other  lines with `content` or `text`, or with `turns`, of which the first is the document
.json          such lines too, or LMFlow's {"type": "text_only", "instances": [{"text": ...}, ...]}
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint_tools.source import Source
from ep_engine.checkpoint import tokenizer_folder
from ep_engine.errors import UserError


class Document(NamedTuple):
    """One text, and where it stands."""

    text: str
    file: str  # its name
    number: int  # of its line or instance, from 0


def documents(paths: Sequence[Path]) -> Iterator[Document]:
    """All documents of files and of the `.jsonl` and `.txt` files in folders, in the order of names and lines.

    Raises:
        UserError: a path is missing or of another kind, a line or instance is no JSON object with a text, or there is
            nothing at all.
    """
    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))} holds no .jsonl or .txt file; give documents")
    found = False
    for file in files:
        for document in _of_file(file):
            found = True
            yield document
    if not found:
        raise UserError(f"{', '.join(map(str, paths))} holds no document; give some")


def blocks(texts: Iterator[str], tokenizer: Path, length: int) -> Iterator[Tensor]:
    """Tokens of texts one after the other, cut into blocks of so many, (S,) int64; what is left at the end is dropped.

    No token is padding. Texts are parted by the tokenizer's end token, if it has one.

    Raises:
        UserError: the folder holds no tokenizer that can be read.
    """
    encoder = tokenizer_in(tokenizer)
    end = [] if encoder.eos_token_id is None else [encoder.eos_token_id]
    held: list[int] = []
    for text in texts:
        held += encoder(text, add_special_tokens=False)["input_ids"] + end
        while len(held) >= length:
            yield torch.tensor(held[:length])
            held = held[length:]


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of a folder; UserError if it cannot be read."""
    from transformers import AutoTokenizer  # which takes seconds

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def rows_of_text(models: Sequence[Source], corpus: Sequence[Path], length: int, max_tokens: int) -> list[Tensor]:
    """The first rows of a corpus, (S,) each, by the tokenizer of the first of some models that has one.

    Raises:
        UserError: none has a tokenizer, a row is longer than a model's positions, or the corpus is shorter than a row.
    """
    folders = [folder for model in models if (folder := tokenizer_folder(model.folder)) is not None]
    if not folders:
        names = " and ".join(str(model.folder) for model in models)
        raise UserError(f"{names} has no tokenizer, which the text of the corpus needs; copy one beside it")
    positions = min(model.config.max_position_embeddings for model in models)
    if length > positions:
        raise UserError(
            f"--sequence-length ({length}) is longer than the model's positions ({positions}); choose a shorter one"
        )
    texts = (document.text for document in documents(corpus))
    rows = list(islice(blocks(texts, folders[0], length), max_tokens // length))
    if not rows:
        raise UserError(
            f"{', '.join(map(str, corpus))} or --max-tokens ({max_tokens}) is less than one row of --sequence-length "
            f"({length}) tokens; give more text, or make rows shorter"
        )
    return rows


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".txt"))


def _of_file(file: Path) -> Iterator[Document]:
    try:
        if file.suffix == ".txt":
            yield Document(file.read_text(encoding="utf-8"), file.name, 0)
            return
        instances = _instances(file) if file.suffix == ".json" else None
        if instances is not None:
            for number, record in enumerate(instances):
                yield Document(_text_of(record, f"instance {number + 1} of {file}"), file.name, number)
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    text = _text_of(_parsed(line), f"line {number + 1} of {file}")
                    yield Document(text, file.name, number)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); correct it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error.reason}); correct it") from None


def _instances(file: Path) -> list[Any] | None:
    """Those of LMFlow's format; None: the file is of another."""
    whole = _parsed(file.read_text(encoding="utf-8"))
    found = whole.get("instances") if isinstance(whole, dict) else None
    return found if isinstance(found, list) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _text_of(record: Any, where: str) -> str:
    text = None
    if isinstance(record, dict):
        turns = record.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else record.get("content", record.get("text"))
    if not isinstance(text, str):
        raise UserError(f"{where} is no JSON object with `content` or `text`; correct it")
    return text
