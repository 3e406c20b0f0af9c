"""The texts that a model is condensed on, one row of tokens after the other, and the model over them, layer by layer.

A text begins with what the tokenizer puts before one, and sees no other. All texts of a corpus weigh the same,
whatever their lengths, as in the published code.

Shape letters:  T tokens of all texts   N texts   D model dim
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoint_tools.documents import documents, tokenizer_in
from checkpoint_tools.forward import attention_of
from checkpoint_tools.source import Source
from ep_engine.attention import Positions
from ep_engine.checkpoint import tokenizer_folder
from ep_engine.errors import Fault, UserError

_TEXTS_AT_ONCE = 8  # in attention; shorter ones are padded behind, where nothing that is causal looks


@dataclass(frozen=True)
class Texts:
    """Tokens of texts."""

    ids: tuple[Tensor, ...]  # (S,) int64 each, S >= 1
    num_cut: int = 0  # texts that were longer than the limit, of which only the beginning is here
    first: int = 0  # number in the corpus of the first text here
    step: int = 1  # from a text here to the next, in the corpus

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [len(ids) for ids in self.ids]

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def shares(self) -> Tensor:
        """(T,) float64: of every token in the mean over texts of the means over their tokens."""
        return torch.cat([torch.full((n,), 1 / (n * len(self.ids)), dtype=torch.float64) for n in self.lengths])

    def times(self, count: int) -> "Texts":
        """The same texts so many times, one whole row after the other."""
        return Texts(self.ids * count, self.num_cut)

    def of_rank(self, rank: int, size: int) -> "Texts":
        """A share of the texts, of one of several ranks; it may be empty."""
        return Texts(self.ids[rank::size], self.num_cut, first=rank, step=size)

    def text_of(self, token: int) -> int:
        """Which text of the corpus a token belongs to."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return self.first + self.step * int((ends > token).nonzero()[0])


def read_texts(model: Source, corpus: Sequence[Path], max_length: int | None, max_texts: int | None = None) -> Texts:
    """Documents of a corpus by the model's tokenizer, special tokens included, cut to `max_length` and the context.

    Raises:
        UserError: the model has no tokenizer, the corpus is empty, or its ids are not those of the model.
    """
    folder = tokenizer_folder(model.folder)
    if folder is None:
        raise UserError(f"{model.folder} has no tokenizer, which the text of the corpus needs; copy one beside it")
    encoder, limit = tokenizer_in(folder), min(max_length or 1 << 62, model.config.max_position_embeddings)
    found, cut = [], 0
    for document in islice(documents(corpus), max_texts):
        ids = encoder(document.text, verbose=False)["input_ids"]
        cut += len(ids) > limit
        if ids:
            found.append(torch.tensor(ids[:limit]))
    if not found:
        raise UserError(f"{', '.join(map(str, corpus))} holds no text but empty ones; give others")
    highest = max(int(ids.max()) for ids in found)
    if highest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} gives id {highest}, the model has {model.config.vocab_size}; copy that of the "
            "model"
        )
    return Texts(tuple(found), cut)


def embedded(model: Source, texts: Texts) -> Tensor:
    """The residual stream before the first layer, (T, D) float32."""
    return F.embedding(torch.cat(texts.ids), model.tensors["embed.weight"]).float()


def attended_texts(x_TD: Tensor, texts: Texts, model: Source, positions: Positions, layer: int) -> Tensor:
    """The residual stream after a layer's attention, (T, D), each text by itself."""
    attend = attention_of(model.config, model.tensors, positions, layer)
    found = []
    for rows in _batches(x_TD.split(texts.lengths)):
        padded_BSD = attend(pad_sequence(list(rows), batch_first=True))
        found += [row[: len(given)] for row, given in zip(padded_BSD, rows, strict=True)]
    return torch.cat(found)


def checked(x_TD: Tensor, texts: Texts, where: str) -> Tensor:
    """The same; Fault if something is not finite."""
    finite_T = x_TD.isfinite().all(dim=1)
    if not finite_T.all():
        text = texts.text_of(int((~finite_T).nonzero()[0]))
        raise Fault(
            f"the output of {where} is not a number in text {text} of the corpus (from 0); check the model's weights"
        )
    return x_TD


def _batches(rows: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    for first in range(0, len(rows), _TEXTS_AT_ONCE):
        yield rows[first : first + _TEXTS_AT_ONCE]
