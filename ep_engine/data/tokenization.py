"""From documents to token files, in several processes, with what could not be read written down.

    [files -> documents -> token ids -> token files] -> batches -> model

PREFIX.bin, .idx      the tokens, and with conversations PREFIX_loss_mask.bin, .idx
PREFIX.json           whose ids they are, and how many
PREFIX.malformed      "file:line: reason" of every document that could not be read, if there is one
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.data.conversations import Chat, Format, chat_of
from ep_engine.data.corpus import load_tokenizer
from ep_engine.data.documents import Block, blocks
from ep_engine.data.encoder import Encoded, Encoder, begin_process, encode
from ep_engine.data.tokens import write_masked_token_file, write_token_file
from ep_engine.data.vocabulary import hash_of_vocabulary, write_about
from ep_engine.errors import Fault, UserError
from ep_engine.output import whole_file

_BLOCKS_AHEAD = 4  # for every process, so that none waits for the slowest
_BYTES_PER_PROCESS = 8 << 20  # for less, another process is not worth its start
_SHOWN = 5  # malformed documents that are told at once

Advance = Callable[[int, int], None]  # bytes read, tokens written


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read."""

    tokenizer: Path  # Hugging Face folder
    format: Format = "text"
    template: str | None = None  # of conversations; None: the tokenizer's own
    bos: bool = False  # documents begin with the tokenizer's first token
    lines: bool = False  # of a .txt file are documents
    max_length: int | None = None  # tokens of a conversation; None: any
    processes: int = 1


@dataclass(kw_only=True)
class Tokenized:
    """What became of a corpus."""

    prefix: Path
    num_tokens: int = 0
    num_documents: int = 0
    num_responses: int | None = None  # tokens of responses; None: no conversations
    num_empty: int = 0  # documents without a character, left out
    num_malformed: int = 0  # left out as well
    largest_id: int = 0
    malformed: list[str] = field(default_factory=list)  # the first of them

    def report(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"prefix": str(self.prefix)}

    def sentence(self) -> str:
        """For people."""
        learnt = "" if self.num_responses is None else f", {self.num_responses} of them responses"
        empty = f", {self.num_empty} empty ones left out" if self.num_empty else ""
        return f"wrote {self.prefix}: {self.num_tokens} tokens{learnt}, {self.num_documents} documents{empty}"


class Tokenizing:
    """One tokenizer, for any number of corpora."""

    def __init__(self, reading: Reading) -> None:
        """Load the tokenizer.

        Raises:
            UserError: it is none, or has no template or first token that is asked for.
        """
        tokenizer = load_tokenizer(reading.tokenizer)
        self.reading = reading
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        if reading.bos and tokenizer.bos_token_id is None:
            raise UserError(f"tokenizer {reading.tokenizer} names no bos_token; leave --bos out, or add one to it")
        if reading.template is not None and reading.format == "text":
            raise UserError(f"--template {reading.template} has no effect on texts; give --format alpaca or sharegpt")
        if reading.max_length is not None and reading.format == "text":
            raise UserError(
                f"--max-length {reading.max_length} is for conversations, texts are cut into rows; leave it out, or "
                "give --format alpaca or sharegpt"
            )
        chat: Chat | None = None
        if reading.format != "text":
            names = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
            chat = chat_of(reading.template, tokenizer.chat_template, names, str(reading.tokenizer))
        self._words: str = tokenizer.backend_tokenizer.to_str()
        self._ends: dict[str, Any] = {"bos": tokenizer.bos_token_id if reading.bos else None}
        self._ends |= {"eos": tokenizer.eos_token_id, "chat": chat, "max_length": reading.max_length}

    def write(self, files: Sequence[Path], prefix: Path, advance: Advance = lambda *_: None) -> Tokenized:
        """Write the documents of files, in their order, as a token file; the same for any number of processes.

        Raises:
            UserError: a file is none of its kind, or there is no document that can be read.
            Fault: the disk is full, or a process died.
        """
        found = Tokenized(prefix=prefix, num_responses=None if self.reading.format == "text" else 0)
        listing = Path(f"{prefix}.malformed")
        with whole_file(listing) as beside, beside.open("w", encoding="utf-8") as malformed:
            with self._encoding(files) as encode_all:
                encoded = encode_all(chain.from_iterable(self._blocks(file) for file in files))
                documents = _documents(_counted(encoded, found, malformed.write, advance))
                first = next(documents, None)
                if first is None:
                    raise UserError(_nothing(files, found))
                size, rest = max(self.vocabulary.values()) + 1, chain((first,), documents)
                if found.num_responses is None:
                    counts = write_token_file(prefix, (ids for ids, _ in rest), size)
                else:
                    counts = write_masked_token_file(prefix, rest, size)
            found.num_tokens, found.num_documents = counts
        if found.num_malformed == 0:
            listing.unlink()
        numbers = {k: value for k, value in found.report().items() if k.startswith("num_") or k == "largest_id"}
        about = {"tokenizer": str(self.reading.tokenizer), "vocabulary": hash_of_vocabulary(self.vocabulary)}
        write_about(prefix, about | {"format": self.reading.format, "template": self.reading.template} | numbers)
        return found

    def _blocks(self, file: Path) -> Iterator[Block]:
        return blocks(file, lines=self.reading.lines, records=self.reading.format != "text")

    @contextmanager
    def _encoding(self, files: Sequence[Path]) -> Iterator[Callable[[Iterable[Block]], Iterator[Encoded]]]:
        size = sum(file.stat().st_size for file in files)
        processes = min(self.reading.processes, size // _BYTES_PER_PROCESS)
        arguments = (self._words, self.reading.format, self._ends)
        if processes < 2:
            encoder = Encoder(self._words, self.reading.format, **self._ends)
            yield lambda blocks: map(encoder, blocks)
            return
        context = multiprocessing.get_context("forkserver")  # libraries here have threads, which fork does not copy
        pool = ProcessPoolExecutor(processes, context, begin_process, arguments)
        try:
            yield lambda blocks: _in_order(pool, blocks, processes * _BLOCKS_AHEAD)
        except BrokenProcessPool:
            raise Fault(f"a process of {processes} that tokenised died; give less with --processes") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, blocks: Iterable[Block], ahead: int) -> Iterator[Encoded]:
    """Blocks in their order, no more of them in memory than `ahead`."""
    waiting: deque[Future[Encoded]] = deque()
    for block in blocks:
        waiting.append(pool.submit(encode, block))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _counted(
    encoded: Iterable[Encoded], found: Tokenized, write: Callable[[str], Any], advance: Advance
) -> Iterator[Encoded]:
    num_bytes = num_tokens = 0
    for block in encoded:
        found.num_empty += block.num_empty
        found.num_malformed += len(block.malformed)
        found.malformed += block.malformed[: _SHOWN - len(found.malformed)]
        write("".join(f"{line}\n" for line in block.malformed))
        if found.num_responses is not None and block.mask_N is not None:
            found.num_responses += int(block.mask_N.sum(dtype=np.int64))
        found.largest_id = max(found.largest_id, int(block.ids_N.max(initial=0)))
        num_bytes, num_tokens = num_bytes + block.num_bytes, num_tokens + len(block.ids_N)
        advance(num_bytes, num_tokens)
        yield block


def _documents(encoded: Iterable[Encoded]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
    """Ids and mask of every document; the mask is empty where there is none."""
    for block in encoded:
        ends = np.cumsum(block.lengths, dtype=np.int64)[:-1]
        masks = np.zeros(0, np.uint8) if block.mask_N is None else block.mask_N
        for ids, mask in zip(np.split(block.ids_N, ends), np.split(masks, ends), strict=True):
            if len(ids):  # a block without documents splits into one without tokens
                yield ids, mask


def _nothing(files: Sequence[Path], found: Tokenized) -> str:
    example = f" (the first is {found.malformed[0]})" if found.malformed else ""
    return (
        f"corpus {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} gives 0 documents: "
        f"{found.num_empty} are empty and {found.num_malformed} malformed{example}; correct them, or give others"
    )
