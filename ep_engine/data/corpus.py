"""From text to token files: source files -> train and held-out -> tokenizer -> Megatron `.bin/.idx`.

    [corpus (text)] -> token files -> batches -> model

Progress is reported through `advance(num_done)`, called with the number of texts or files finished so far.
"""

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ep_engine.data.tokens import write_token_file
from ep_engine.errors import UserError
from ep_engine.output import whole_folder

END_OF_TEXT = "<|endoftext|>"
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
NUM_BYTE_TOKENS = 256  # the alphabet of a byte-level BPE

# Tests and their data say little about code; idlelib is not installed everywhere; the rest is not the library.
_LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTS_PER_BATCH = 64  # enough to keep the encoder's threads busy, few enough to hold in memory

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # transformers makes the first of the others

Advance = Callable[[int], None]


def _ignore(num_done: int) -> None:
    """Report to nobody."""


def standard_library_files() -> list[Path]:
    """Return the `.py` files of the running interpreter's standard library, sorted, without tests and idlelib.

    Raises:
        UserError: the interpreter carries no source files (an embedded or zipped library).
    """
    files = [
        path
        for path in sorted(STANDARD_LIBRARY.rglob("*.py"))
        if _LEFT_OUT.isdisjoint(path.relative_to(STANDARD_LIBRARY).parts)
    ]
    if not files:
        raise UserError(f"standard library {STANDARD_LIBRARY} holds 0 .py files; use a Python that has its sources")
    return files


def split_by_file(
    files: Iterable[Path], heldout_fraction: float, seed: int, *, root: Path = STANDARD_LIBRARY
) -> tuple[list[Path], list[Path]]:
    """Split files under `root` into train and held-out, each file by a hash of its path relative to `root`.

    A file's side depends on nothing but its relative path and the seed: other files may come and go. Both lists are in
    hash order, so that the first tokens of a held-out file do not all come from one package.

    Args:
        files: Any order; the answer does not depend on it.
        heldout_fraction: In (0, 1): the expected share of files held out.
        seed: Any int.

    Raises:
        UserError: one of the two sides is empty.
    """
    scale = float(1 << 64)
    place = {path: _hash(seed, path.relative_to(root)) / scale for path in files}
    ordered = sorted(place, key=lambda path: (place[path], path))
    heldout = [path for path in ordered if place[path] < heldout_fraction]
    train = ordered[len(heldout) :]
    if not train or not heldout:
        raise UserError(
            f"held-out fraction {heldout_fraction} of {len(ordered)} files leaves {len(train)} for training and "
            f"{len(heldout)} held out; both need one: give more files or another fraction"
        )
    return train, heldout


def read_source(path: Path) -> str | None:
    """Return the text of a source file in the coding it declares (PEP 263, UTF-8 by default); None if it is not."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, LookupError, UnicodeDecodeError):
        return None


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, advance: Advance = _ignore, *, overwrite: bool = False
) -> int:
    """Train a byte-level BPE and write it as a Hugging Face tokenizer directory; equal texts give equal files.

    Every byte is a token, so any text encodes, and decodes to itself. The end-of-text token has id 0.

    Args:
        texts: Read once. The standard library (11 MB) takes 2 s on 2 cores: no need to train on a part of it.
        vocab_size: At least 257: the bytes and the end-of-text token.
        folder: New or empty, unless `overwrite` is set.

    Returns:
        The number of tokens, `vocab_size` unless the texts ran out of pairs to merge.

    Raises:
        UserError: `vocab_size` is too small, or `folder` is not empty.
    """
    if vocab_size <= NUM_BYTE_TOKENS:
        raise UserError(f"vocab_size ({vocab_size}) must be at least {NUM_BYTE_TOKENS + 1}: all bytes and end-of-text")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_counted(texts, advance), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
    with whole_folder(folder, overwrite=overwrite) as beside:
        fast.save_pretrained(beside)
        _name_class_for_transformers_4(beside / "tokenizer_config.json")
    return bpe.get_vocab_size()


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What `encode_files` wrote, and what it could not read."""

    num_tokens: int  # end-of-text tokens included
    num_documents: int
    skipped: tuple[Path, ...]  # files that are not text in the coding they declare


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and those below the given folders, hidden ones left out, in the order of their names.

    Raises:
        UserError: a path does not exist, or there is no file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            below = (file for file in path.rglob("*") if file.is_file())
            visible = (f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts))
            files += sorted(visible)
        else:
            raise UserError(f"corpus {path} does not exist; give text files, .jsonl files or folders of them")
    if not files:
        raise UserError(f"corpus {', '.join(map(str, paths))} holds 0 files; give text files, .jsonl files or folders")
    return files


def encode_files(
    files: Sequence[Path],
    tokenizer_folder: Path,
    prefix: Path,
    advance: Advance = _ignore,
    *,
    max_tokens: int | None = None,
) -> Encoded:
    """Tokenise each file into one document closed by end-of-text, and write them as `prefix`.bin and `prefix`.idx.

    The order of documents is the order of files. Of a `.jsonl` file every line is a document, its `text` or `content`.
    The characters of the end-of-text token inside a file are encoded as ordinary text: a file cannot end its own
    document. Batches of documents are encoded on all cores; files are not read on when there are `max_tokens`.

    Raises:
        UserError: `tokenizer_folder` is no fast Hugging Face tokenizer with an end-of-text token, or no file is text.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    bpe: Tokenizer = tokenizer.backend_tokenizer
    bpe.encode_special_tokens = True
    skipped: list[Path] = []
    num_tokens, num_documents = write_token_file(
        prefix,
        _encoded(_documents(files, skipped, advance), bpe, tokenizer.eos_token_id, max_tokens),
        vocab_size=max(bpe.get_vocab().values()) + 1,
    )
    return Encoded(num_tokens=num_tokens, num_documents=num_documents, skipped=tuple(skipped))


def _documents(files: Sequence[Path], skipped: list[Path], advance: Advance) -> Iterator[str]:
    """The texts of all files; those that are none are appended to `skipped`."""
    for number, path in enumerate(files, start=1):
        if path.suffix == ".jsonl":
            yield from _lines(path)
        else:
            text = read_source(path)
            if text is None:
                skipped.append(path)
            else:
                yield text
        advance(number)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield str(record["text"] if "text" in record else record["content"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number} of {path} must be a JSON object with text or content, got {line[:40]!r}; correct it"
                ) from None


def _encoded(
    documents: Iterable[str], bpe: Tokenizer, end_of_text: int, max_tokens: int | None
) -> Iterator[NDArray[np.int64]]:
    num_tokens, left = 0, iter(documents)
    while batch := list(islice(left, _DOCUMENTS_PER_BATCH)):
        for encoding in bpe.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, end_of_text], dtype=np.int64)
            num_tokens += len(encoding.ids) + 1
        if max_tokens is not None and num_tokens >= max_tokens:
            return


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a Hugging Face directory.

    Raises:
        UserError: `folder` is no fast Hugging Face tokenizer with an end-of-text token.
    """
    # A folder that is not there would be looked up on the hub.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"tokenizer folder {folder} holds none of {', '.join(_TOKENIZER_FILES)}; give a Hugging Face tokenizer"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        words = (str(error) or type(error).__name__).strip().splitlines()[0]
        way = "write it again"
        if not (folder / "tokenizer.json").is_file():
            way = (
                "for a tokenizer.model install sentencepiece, or save it with transformers, which writes tokenizer.json"
            )
        raise UserError(f"tokenizer folder {folder} cannot be loaded ({words}); {way}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer folder {folder} has a {type(tokenizer).__name__}, of which no tokenizer.json can be made; "
            "give another"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer folder {folder} names no eos_token; documents need an end: add one to its config")
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def _counted(texts: Iterable[str], advance: Advance) -> Iterator[str]:
    for num_done, text in enumerate(texts, start=1):
        yield text
        advance(num_done)


def _name_class_for_transformers_4(path: Path) -> None:
    """transformers 5 writes its new class name, which transformers 4 does not know; both know this one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _hash(seed: int, path: Path) -> int:
    return int.from_bytes(hashlib.blake2b(b"%d/" % seed + os.fsencode(path.as_posix()), digest_size=8).digest())
