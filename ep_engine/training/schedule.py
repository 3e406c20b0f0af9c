"""The learning rate of every step: warm-up, then a cosine, a line, or a plateau with a fall at its end (WSD)."""

import math

from ep_engine.config import TrainSection


def learning_rate(train: TrainSection, step: int, tokens_per_step: int = 1) -> float:
    """Rate of step 0..steps-1: linear warm-up, then down to the minimum at the last step.

    `cosine`: half a cosine. `linear`: a line. `wsd` (arXiv:2404.06395): the peak, but for a line over the last
    `decay_steps`.
    """
    warmup = warmup_steps(train, tokens_per_step)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    begin = warmup
    if train.schedule == "wsd":
        decay = train.decay_steps or max(train.steps // 10, 1)
        begin = max(warmup, train.steps - 1 - decay)
    span = max(train.steps - 1 - begin, 1)  # one step after warm-up has the peak rate
    progress = min(max(step - begin, 0) / span, 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * left


def warmup_steps(train: TrainSection, tokens_per_step: int) -> int:
    """Steps of warm-up, which may be told in tokens."""
    return train.warmup_steps if train.warmup_tokens is None else math.ceil(train.warmup_tokens / tokens_per_step)
