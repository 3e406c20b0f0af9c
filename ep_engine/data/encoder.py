"""Encoder: a block of documents becomes token ids, with a loss mask where they are conversations.

    files -> [documents -> token ids] -> token files -> batches -> model

Processes that do nothing else import this file, so neither torch nor transformers is needed for text.

Shape letters:  N tokens of all documents of a block
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ep_engine.data.conversations import Chat, Format, messages_of
from ep_engine.data.documents import Block, text_of, value_of


@dataclass(frozen=True)
class Encoded:
    """What became of a block."""

    ids_N: NDArray[np.int32]
    mask_N: NDArray[np.uint8] | None  # 1 where a token of a response is; None: all are to be learnt
    lengths: list[int]  # tokens of every document, in their order
    num_empty: int  # documents without a character
    malformed: list[str]  # "file:line: reason" of what could not be read
    num_bytes: int  # of the file


class Encoder:
    """A tokenizer, and what documents are.

    Args:
        tokenizer: JSON of a `tokenizers.Tokenizer`.
        kind: what a document is.
        bos: id that every document begins with; None: none.
        eos: id that every text ends with. What ends a conversation is the template's business.
        chat: how conversations become text.
        max_length: tokens that a conversation may have; see `fitting`.
    """

    def __init__(
        self,
        tokenizer: str,
        kind: Format,
        *,
        bos: int | None,
        eos: int,
        chat: Chat | None,
        max_length: int | None = None,
    ) -> None:
        self._max_length = max_length
        self._bpe, self._kind, self._bos, self._eos, self._chat = Tokenizer.from_str(tokenizer), kind, bos, eos, chat
        # A text that spells a special token cannot end its own document; a template does spell them.
        self._bpe.encode_special_tokens = kind == "text"

    def __call__(self, block: Block) -> Encoded:
        """Encode all documents of a block that can be read."""
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        malformed: list[str] = []
        num_empty = 0
        for number, item in enumerate(block.items, start=block.first):
            if isinstance(item, bytes) and block.is_json and not item.strip():
                continue  # a blank line between records is nobody's document
            try:
                text, responses = self._text(value_of(item, is_json=block.is_json))
            except ValueError as error:
                malformed.append(f"{block.file}:{number}: {' '.join(str(error).split())}")
                continue
            if text:
                texts.append(text)
                spans.append(responses)
            else:
                num_empty += 1
        documents, masks = self._tokens(texts, spans)
        return Encoded(
            np.concatenate([*documents, np.zeros(0, np.int32)], dtype=np.int32),
            None if self._chat is None else np.concatenate([*masks, np.zeros(0, np.uint8)], dtype=np.uint8),
            [len(document) for document in documents],
            num_empty,
            malformed,
            block.num_bytes,
        )

    def _text(self, value: Any) -> tuple[str, list[tuple[int, int]]]:
        if self._chat is None:
            return text_of(value), []
        return self._chat.with_responses(messages_of(value, self._kind))

    def _tokens(
        self, texts: list[str], spans: list[list[tuple[int, int]]]
    ) -> tuple[list[NDArray[np.int32]], list[NDArray[np.uint8]]]:
        begin = [] if self._bos is None else [self._bos]
        if self._chat is None:
            encodings = self._bpe.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array([*begin, *encoding.ids, self._eos], np.int32) for encoding in encodings], []
        documents, masks = [], []
        for encoding, responses in zip(self._bpe.encode_batch(texts, add_special_tokens=False), spans, strict=True):
            front = begin if encoding.ids[:1] != begin else []  # a template may spell it
            ids = np.array([*front, *encoding.ids], np.int32)
            mask = np.concatenate((np.zeros(len(front), np.uint8), response_mask(encoding.offsets, responses)))
            kept = slice(None) if self._max_length is None else fitting(mask, self._max_length)
            documents.append(ids[kept])
            masks.append(mask[kept])
        return documents, masks


def fitting(mask_N: NDArray[np.uint8], most: int) -> NDArray[np.int64] | slice:
    """Which tokens of a conversation stay, if it may have only so many.

    Whole turns, a question and its response, from the first on. Where the first is too long, question and response lose
    their ends in proportion: of s and t tokens max(int(most * t / (s + t)), 1) of the response stay, and as many of the
    question as there is room for (LLaMA-Factory, with which MoLlama was tuned).
    """
    if len(mask_N) <= most:
        return slice(None)
    ends = np.flatnonzero(np.diff(mask_N.astype(np.int8), append=0) == -1) + 1  # behind each response
    if not len(ends) or ends[0] <= most:
        return slice(int(ends[ends <= most].max(initial=0)) or most)
    question = int(mask_N.argmax())
    response = max(int(most * (int(ends[0]) - question) / int(ends[0])), 1)
    return np.concatenate((np.arange(most - response), np.arange(question, question + response)))


def response_mask(offsets: Sequence[tuple[int, int]], responses: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Which tokens hold a character of a response, 1 or 0.

    Args:
        offsets: characters [begin, end) of every token. Some tokenizers trim white space off: a token of nothing else
            then has begin = end, behind its characters.
        responses: characters [begin, end) of each.
    """
    begin_end = np.array(offsets, np.int64).reshape(-1, 2)
    end = begin_end[:, 1]
    begin = np.minimum(begin_end[:, 0], end - 1)
    mask = np.zeros(len(offsets), np.uint8)
    for response_begin, response_end in responses:
        mask |= ((end > response_begin) & (begin < response_end)).astype(np.uint8)
    return mask


_encoder: Encoder | None = None  # of a process of a pool, which has no other place for it


def begin_process(tokenizer: str, kind: Format, ends: dict[str, Any]) -> None:
    """Make the encoder of a process that does nothing else; the arguments are those of `Encoder`."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes already
    _encoder = Encoder(tokenizer, kind, **ends)


def encode(block: Block) -> Encoded:
    """Encode with the encoder of this process."""
    assert _encoder is not None, "the process has begun"
    return _encoder(block)
