"""Profile: count on real text which experts serve tokens together."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ep_engine import checkpoint, ops
from ep_engine.checkpoint import read_manifest
from ep_engine.collaboration import Profile
from ep_engine.errors import UserError
from ep_engine.load_balance import RouterStatistics
from ep_engine.model import Decoder
from ep_engine.model_config import read_model_config
from ep_engine.parallelize import entries_of
from ep_engine.tokens import Batches, TokenFile

_ROWS = 16  # windows per forward pass


@torch.no_grad()
def profile(
    folder: Path,
    tokens: TokenFile,
    *,
    max_tokens: int,
    sequence_length: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
    see: Callable[[int, Tensor], None] = lambda layer, ids_TK: None,
) -> Profile:
    """Count co-activation over a random sample of windows of a token file, without gradients, in one CPU process.

    Args:
        folder: engine checkpoint of a MoE model.
        tokens: the text.
        max_tokens: how many tokens, rounded down to whole windows; at least one window.
        sequence_length: S, tokens of a window.
        seed: of the sample.
        advance: called with the number of tokens done.
        see: called with a layer and the experts of the next tokens in it.

    Raises:
        UserError: the model is dense, or the text is shorter than asked for.
    """
    config = read_model_config(folder / "model.json")
    if config.moe is None:
        raise UserError(f"{folder} is a dense model, profile counts experts; split it first")
    if max_tokens < sequence_length:
        raise UserError(f"--max-tokens ({max_tokens}) must be at least one window of {sequence_length} tokens")
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length ({sequence_length}) is longer than the model's positions "
            f"({config.max_position_embeddings}); choose a shorter one"
        )
    model = load_model(folder, torch.device("cpu"))
    num_windows = max_tokens // sequence_length
    batches = Batches(tokens, sequence_length=sequence_length, batch_size=1, seed=seed)
    if num_windows > batches.num_windows:
        raise UserError(
            f"--max-tokens asks for {num_windows} windows of {sequence_length} tokens, {tokens.bin_path} has "
            f"{batches.num_windows}; ask for fewer or give more text"
        )
    experts = config.moe.num_experts
    counts_LEE = torch.zeros(config.num_layers, experts, experts, dtype=torch.int64)

    def count(x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        for layer, router in routers.items():
            ops.count_pairs(router.ids_TK, counts_LEE[layer])
            see(layer, router.ids_TK)
        return x

    model.watch = count
    for start in range(0, num_windows, _ROWS):
        windows = range(start, min(start + _ROWS, num_windows))
        inputs_BS = torch.cat([batches.batch(window)[0] for window in windows])
        model(inputs_BS)
        advance((start + len(windows)) * sequence_length)
    about = {
        "tokens": num_windows * sequence_length,
        "seed": seed,
        "model_hash": _hash_of_model(folder),
        "corpus_hash": _hash_of_file(tokens.bin_path),
    }
    return Profile.of_pairs(counts_LEE.numpy(), config.moe.top_k, about)


def load_model(folder: Path, device: torch.device) -> Decoder:
    """A whole model of an engine checkpoint in this process, in evaluation mode."""
    with torch.device("meta"):
        model = Decoder(read_model_config(folder / "model.json"))
    model.to_empty(device=device)
    checkpoint.load(folder, entries_of([model]))
    return model.eval()


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_model(folder: Path) -> str:
    """sha256 over the checksums of all weights."""
    sums = read_manifest(folder)["checksums"]
    weights = sorted(f"{name} {value}" for name, value in sums.items() if "/" not in name)
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()
