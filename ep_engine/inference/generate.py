"""Generate: prompts continued token by token, greedily or by sampling, on one rank or on several.

Shape letters:  B rows of this rank   S positions of a pass   V vocabulary
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.checkpoint import tokenizer_folder
from ep_engine.errors import UserError
from ep_engine.inference.loaded_model import LoadedModel
from ep_engine.kv_cache import KVCache
from ep_engine.model_config import ModelConfig

Ends = Callable[[Sequence[int]], bool]
"""Whether a continuation, of at least one token, is complete."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: by which logits are divided; 0: the likeliest token is taken.
        top_p: in (0, 1]; of the likeliest tokens as few as together have this probability may be drawn
            (arXiv:1904.09751 eq. 2).
        seed: of the draws; what a prompt draws does not depend on the others, nor on the ranks.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One text to continue: its number, and its tokens, at least one."""

    number: int
    tokens: Sequence[int]


@torch.no_grad()
def generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int, ends: Ends, sampling: Sampling
) -> list[list[int]]:
    """Continue this rank's prompts by at least one token and at most `max_new_tokens`, the last of which ended it.

    Every rank calls this; ranks go on together until the last row of the last rank is done, because a row may need any
    expert. `ends` is asked after each token.
    """
    longest = max((len(prompt.tokens) for prompt in prompts), default=1)
    pads = [longest - len(prompt.tokens) for prompt in prompts]
    padded = [[0] * pad + list(prompt.tokens) for pad, prompt in zip(pads, prompts, strict=True)]
    ids_BS = torch.tensor(padded, dtype=torch.int64, device=loaded.device).view(len(prompts), longest)
    cache = KVCache(torch.tensor(pads, dtype=torch.int64, device=loaded.device), longest + max_new_tokens)
    draws = [_draws(sampling.seed, prompt.number) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for _ in range(max_new_tokens):
        next_B = choose(loaded.model(ids_BS, cache=cache)[:, -1], sampling, draws)
        for row, token in enumerate(next_B.tolist()):
            if going[row]:
                found[row].append(token)
                going[row] = not ends(found[row])
        if not _any_rank(any(going), loaded):
            break
        ids_BS = next_B.unsqueeze(1)  # rows that are done go on, and nobody looks
    return found


def choose(logits_BV: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> Tensor:
    """(B, V) float -> (B,) int64: the next token of every row, drawn with a generator of its own."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    sorted_BV, ids_BV = (logits_BV.double() / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = sorted_BV.where(before_BV < sampling.top_p, 0.0)
    upto_BV = kept_BV.cumsum(dim=-1)
    uniform_B = torch.tensor([float(torch.rand((), dtype=torch.float64, generator=draw)) for draw in draws])
    drawn_B1 = uniform_B.to(upto_BV).unsqueeze(1) * upto_BV[:, -1:]
    last_B1 = (kept_BV > 0).sum(dim=-1, keepdim=True) - 1
    place_B1 = torch.searchsorted(upto_BV, drawn_B1, right=True).minimum(last_B1)
    return ids_BV.gather(1, place_B1).squeeze(1)


def _draws(seed: int, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def _any_rank(here: bool, loaded: LoadedModel) -> bool:
    flag = torch.tensor(int(here), device=loaded.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=loaded.meshes.world)
    return bool(flag)


def continue_all(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Ends,
    sampling: Sampling,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """What follows every prompt, as `generate` finds it; ranks share the prompts, and each returns all.

    `batch_size` prompts of a rank are continued at once. `advance` is called with the number of prompts done.
    """
    numbered = [Prompt(number, tokens) for number, tokens in enumerate(prompts)]
    found: list[list[int]] = []
    for answers in loaded.share_out(
        numbered, batch_size, lambda own: generate(loaded, own, max_new_tokens, ends, sampling)
    ):
        found += answers
        advance(len(found))
    return found


def encode(tokenizer: Any, text: str, config: ModelConfig) -> list[int]:
    """The tokens of a prompt; UserError if there are none, or the model does not know one."""
    tokens: list[int] = tokenizer.encode(text)
    if not tokens:
        raise UserError(f"prompt {text!r} has no tokens, so there is nothing to continue; write something")
    if max(tokens) >= config.vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(tokens)} for prompt {text[:40]!r}, outside of the model's vocabulary of "
            f"{config.vocab_size}; use the tokenizer that the model was made for"
        )
    return tokens


def check_lengths(prompts: Sequence[list[int]], max_new_tokens: int, config: ModelConfig) -> int:
    """Tokens of the longest prompt; UserError if it and what is to follow are more than the model has places for."""
    longest = max(len(tokens) for tokens in prompts)
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"the longest prompt has {longest} tokens, with --max-new-tokens ({max_new_tokens}) more than the model's "
            f"{config.max_position_embeddings} positions; shorten one of the two"
        )
    return longest


def end_tokens(config: ModelConfig, tokenizer: Any) -> set[int]:
    """The ids after which a text is over: the model's generation_config, config.json, or else the tokenizer's."""
    generation = config.carried.get("generation_config") or {}  # under this key `convert` lets the file travel
    for ids in (generation.get("eos_token_id"), config.carried.get("eos_token_id"), tokenizer.eos_token_id):
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def read_tokenizer(folder: Path, *, run_its_code: bool = False) -> Any:
    """The tokenizer of a checkpoint or of a Hugging Face folder, whose code may be run; UserError if it has none."""
    found = tokenizer_folder(folder)
    if found is None:
        raise UserError(f"{folder} has no tokenizer; make the checkpoint from a folder that has one")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(found, trust_remote_code=run_its_code)
    except Exception as error:  # what is damaged can raise anything
        words = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"tokenizer folder {found} cannot be read ({words}); write it again") from None


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """What `--prompt` and `--prompt-file` give: a line is a prompt, or in a .jsonl the value of its key `prompt`.

    Raises:
        UserError: both or neither are given, or the file cannot be read or has no prompt.
    """
    if bool(prompts) == (file is not None):
        raise UserError(f"give either --prompt ({len(prompts)} given) or --prompt-file ({file}), the texts to continue")
    if file is None:
        return list(prompts)
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--prompt-file {file} cannot be read ({words}); give a prompt a line, or a .jsonl") from None
    if not found or not all(isinstance(one, str) for one in found):
        raise UserError(f"--prompt-file {file} has {len(found)} prompts, not all of them text; give at least one")
    return found
