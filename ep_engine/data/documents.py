"""Documents as they lie in files, in blocks: lines of `.jsonl` and `.txt`, items of `.json`, rows of `.parquet`.

    [files -> documents] -> token files -> batches -> model

A block is what one process encodes at a time, so no more of a corpus is in memory than a few blocks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_engine.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
TEXT_KEYS = ("content", "text")
_BYTES_PER_BLOCK = 1 << 20
_ROWS_PER_BLOCK = 1024  # of a .parquet or .json file


@dataclass(frozen=True)
class Block:
    """Documents of a file that follow each other."""

    file: Path
    first: int  # number of the first, from 1
    items: Sequence[Any]  # bytes of a line or of a whole .txt, else the record itself
    num_bytes: int  # of the file that were read for it
    is_json: bool  # whether bytes are a JSON value; else they are text


def document_files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and those below the given folders, hidden ones left out, in the order of their names.

    Raises:
        UserError: a path does not exist, a given file is of no known kind, or there is no file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (f for f in path.rglob("*") if f.is_file() and f.suffix in SUFFIXES)
            files += sorted(f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts))
        elif not path.is_file():
            raise UserError(f"corpus {path} does not exist; give files or folders of documents")
        elif path.suffix not in SUFFIXES:
            raise UserError(
                f"corpus {path} must end in {', '.join(SUFFIXES)}, got {path.suffix!r}; rename or convert it"
            )
        else:
            files.append(path)
    if not files:
        raise UserError(
            f"corpus {', '.join(map(str, paths))} holds 0 files that end in {', '.join(SUFFIXES)}; give documents"
        )
    return files


def domains(folder: Path) -> dict[str, list[Path]]:
    """The files of every folder in `folder`, by its name.

    Raises:
        UserError: there is no folder in it, or one holds no file of documents.
    """
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise UserError(f"corpus {folder} holds 0 folders, and every domain is one; leave --domains out, or make them")
    return {name: document_files([folder / name]) for name in names}


def blocks(file: Path, *, lines: bool = False, records: bool = False) -> Iterator[Block]:
    """All documents of a file in their order.

    Args:
        file: of one of SUFFIXES.
        lines: every line of a `.txt` is a document, not the whole.
        records: of a `.parquet` all columns are wanted, not its text alone.

    Raises:
        UserError: the file cannot be read, or is none of its kind as a whole.
    """
    try:
        if file.suffix == ".jsonl" or (file.suffix == ".txt" and lines):
            yield from _of_lines(file)
        elif file.suffix == ".txt":
            yield Block(file, 1, [file.read_bytes()], file.stat().st_size, is_json=False)
        elif file.suffix == ".json":
            yield from _of_array(file)
        else:
            yield from _of_parquet(file, records)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); correct it") from None


def value_of(item: Any, *, is_json: bool) -> Any:
    """The record or text of an item of a block.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not isinstance(item, bytes):
        return item
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 ({error.reason})") from None
    if not is_json:
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None


def text_of(value: Any) -> str:
    """The text of a document: itself, or its `content` or `text`.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in TEXT_KEYS if key in value), None)
    if not isinstance(value, str):
        raise ValueError("no text under content or text")
    return value


def texts(files: Sequence[Path], malformed: list[str], *, lines: bool = False) -> Iterator[str]:
    """All texts with a character in them; of what cannot be read "file:line: reason" is appended to `malformed`."""
    for file in files:
        for block in blocks(file, lines=lines):
            for number, item in enumerate(block.items, start=block.first):
                if isinstance(item, bytes) and block.is_json and not item.strip():
                    continue
                try:
                    text = text_of(value_of(item, is_json=block.is_json))
                except ValueError as error:
                    malformed.append(f"{file}:{number}: {error}")
                else:
                    if text:
                        yield text


def _of_lines(file: Path) -> Iterator[Block]:
    held: list[bytes] = []
    first, num_bytes = 1, 0
    is_json = file.suffix == ".jsonl"
    with file.open("rb") as opened:
        for line in opened:
            held.append(line.rstrip(b"\r\n"))
            num_bytes += len(line)
            if num_bytes >= _BYTES_PER_BLOCK:
                yield Block(file, first, held, num_bytes, is_json)
                first, held, num_bytes = first + len(held), [], 0
    if held:
        yield Block(file, first, held, num_bytes, is_json)


def _of_array(file: Path) -> Iterator[Block]:
    """A `.json` file is read as a whole: instructions come so, and they are few."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); correct it") from None
    if not isinstance(values, list):
        raise UserError(f"{file} must be a JSON array of records, got {type(values).__name__}; name it .jsonl if it is")
    size = file.stat().st_size
    for at in range(0, len(values), _ROWS_PER_BLOCK):
        items = values[at : at + _ROWS_PER_BLOCK]
        yield Block(file, at + 1, items, size * len(items) // len(values), is_json=True)


def _of_parquet(file: Path, records: bool) -> Iterator[Block]:
    import pyarrow as pa  # here, because it is slow to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            names, num_rows = opened.schema_arrow.names, opened.metadata.num_rows
            column = next((key for key in TEXT_KEYS if key in names and not records), None)
            size, first = file.stat().st_size, 1
            for batch in opened.iter_batches(_ROWS_PER_BLOCK, columns=None if column is None else [column]):
                rows = batch.to_pylist()
                yield Block(file, first, rows, size * len(rows) // num_rows, is_json=True)
                first += len(rows)
    except pa.ArrowException as error:
        raise UserError(f"{file} is no parquet file ({str(error).splitlines()[0]}); correct it") from None
