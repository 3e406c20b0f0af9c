"""Perplexity of held-out token files: every window of the stream, in order, each without the ones before it.

Shape letters:  B windows   S tokens of a window   V vocabulary
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError

Losses = Callable[[Sequence[int]], list[float]]
"""Sums of the losses of windows, by their numbers."""


def num_windows(tokens: TokenFile, sequence_length: int, max_tokens: int | None, positions: int) -> int:
    """Windows to score: those of `max_tokens` tokens, or all, but for what is left at the end.

    Raises:
        UserError: there is no whole window, or the model, of so many positions, has no place for one.
    """
    if sequence_length > positions:
        raise UserError(
            f"--sequence-length ({sequence_length}) is longer than the model's positions ({positions}); choose a "
            "shorter one"
        )
    most = tokens.num_tokens - 1 if max_tokens is None else min(max_tokens, tokens.num_tokens - 1)
    if most < sequence_length:
        raise UserError(
            f"{tokens.bin_path} has {tokens.num_tokens} tokens and --max-tokens is {max_tokens}, of which at least one "
            f"window of {sequence_length} tokens and its last target are needed; choose a shorter --sequence-length"
        )
    return most // sequence_length


@torch.no_grad()
def window_losses(
    logits_of: Callable[[Tensor], Tensor], tokens: TokenFile, windows: Sequence[int], length: int, device: torch.device
) -> list[float]:
    """Sum of the cross entropies of every window, in nats.

    Args:
        logits_of: (B, S) int64 -> (B, S, V); called once, also for no windows.
        tokens: the text.
        windows: their numbers.
        length: S.
        device: of the model.
    """
    read = [tokens.read(window * length, length + 1) for window in windows]
    rows = torch.from_numpy(np.stack(read)) if read else torch.zeros(0, length + 1, dtype=torch.int64)
    logits_BSV = logits_of(rows[:, :-1].to(device))
    losses_BS = F.cross_entropy(logits_BSV.float().transpose(1, 2), rows[:, 1:].to(device), reduction="none")
    sums: list[float] = losses_BS.double().sum(dim=1).tolist()
    return sums


def summary(losses: Sequence[float], sequence_length: int) -> dict[str, Any]:
    """What is reported of the windows' losses: tokens, nats per token, perplexity."""
    count = len(losses) * sequence_length
    mean = math.fsum(losses) / count
    return {"tokens": count, "sequence_length": sequence_length, "loss": mean, "perplexity": math.exp(mean)}
