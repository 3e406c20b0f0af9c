"""Profile: count on real text which experts serve tokens together, on one rank or on several that share the text.

Shape letters:  L MoE layers   E experts   T tokens   K top_k   S positions of a window
"""

import hashlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ep_engine import checkpoint, ops
from ep_engine.c2r.collaboration import Profile, agreement
from ep_engine.data.batches import Batches
from ep_engine.data.corpus import encode_files, text_files
from ep_engine.data.tokens import TokenFile
from ep_engine.data.vocabulary import check_text
from ep_engine.errors import UserError
from ep_engine.load_balance import RouterStatistics
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.model_config import ModelConfig, read_model_config
from ep_engine.parallelize import build, entries_of
from ep_engine.placement import Placement

_ROWS = 16  # windows of a rank in one forward pass


@dataclass(frozen=True)
class Profiled:
    """What a profile's run found.

    Attributes:
        profile: the counts.
        halves: how well two halves of the text agree, as it grew: tokens of a half, and the mean over layers of the
            correlation of their pairs. NaN where a layer has nothing to compare.
        ids_LTK: int16, experts of all tokens on rank 0, if they were to be kept.
        scores_LTE: float16, their logits, likewise.
    """

    profile: Profile
    halves: list[tuple[int, float]]
    ids_LTK: NDArray[np.int16] | None = None
    scores_LTE: NDArray[np.float16] | None = None


def profile(
    folder: Path,
    tokens: TokenFile,
    *,
    max_tokens: int,
    sequence_length: int,
    seed: int = 0,
    keep_ids: bool = False,
    keep_scores: bool = False,
    world: World | None = None,
    timeout_s: float = 300.0,
    advance: Callable[[int], None] = lambda _: None,
) -> Profiled:
    """Count co-activation over a random sample of windows of a token file, without gradients, in float32.

    Ranks share the windows and the experts; what they count is added up, and does not depend on how many there are but
    for whole windows. Windows are full, so that no token is padding.

    Args:
        folder: engine checkpoint of a MoE model.
        tokens: the text.
        max_tokens: how many tokens, rounded down to as many whole windows for every rank; at least one each.
        sequence_length: S, tokens of a window.
        seed: of the sample.
        keep_ids: keep the experts of every token.
        keep_scores: and the routers' logits, in 16 bits.
        world: this process and its fellows, who all call this; None: it is alone.
        timeout_s: a rank that hears nothing from another for so long fails.
        advance: called with the number of tokens done.

    Raises:
        UserError: the model is dense, or the text is shorter than asked for.
    """
    world = world or World()
    config = read_model_config(folder / "model.json")
    num_windows = max_tokens // sequence_length // world.size * world.size
    batches = Batches(tokens, sequence_length=sequence_length, batch_size=1, seed=seed)
    _check(folder, config, batches, tokens, max_tokens, sequence_length, num_windows, world)
    assert config.moe is not None, "just checked"
    device = world.pick_device("auto")
    ep_size = max(n for n in range(1, min(config.experts_of_layer()) + 1) if world.size % n == 0)
    about = {
        "tokens": num_windows * sequence_length,
        "seed": seed,
        "model_hash": checkpoint.hash_of_model(folder),
        "corpus_hash": _hash_of_file(tokens.bin_path),
    }
    settings = about | {"sequence_length": sequence_length}
    with process_groups(world, device, ep_size, timeout_s, settings=settings) as meshes:
        placement = Placement.in_order(config.experts_of_layer(), ep_size)
        (model,), _ = build(
            config, placement, meshes, device=device, dtype=torch.float32, tokens=_ROWS * sequence_length
        )
        checkpoint.load(folder, entries_of([model], experts=meshes.experts), group=meshes.world)
        counter = _Counter(config, sequence_length, device, keep_ids, keep_scores)
        model.eval().watch = counter
        per_pass, passes = _ROWS * world.size, 0
        with torch.no_grad():
            for start in range(0, num_windows, per_pass):
                count = min(per_pass, num_windows - start) // world.size
                first = start + world.rank * count
                counter.first_window = first
                model(torch.cat([batches.batch(window)[0] for window in range(first, first + count)]).to(device))
                passes += 1
                done = (start + count * world.size) * sequence_length
                if passes & (passes - 1) == 0 or done == num_windows * sequence_length:
                    counter.compare_halves(done // 2, meshes)
                advance(done)
        pairs_LEE = counter.total(meshes).sum(axis=0)
        counted = Profile.of_pairs(pairs_LEE, config.moe.top_k, about, config.experts_of_layer())
        ids_LTK = counter.of_all(counter.ids, meshes) if keep_ids else None
        return Profiled(
            counted, counter.halves, ids_LTK, counter.of_all(counter.scores, meshes) if keep_scores else None
        )


@contextmanager
def token_file(
    folder: Path, corpus: Sequence[Path] | None, tokens: Path | None, needed: int, seed: int
) -> Iterator[TokenFile]:
    """The tokens of a token file; or of text, with the tokenizer of a model's folder, while the block runs.

    Text files are taken in a random order until there are `needed` tokens. Every rank does so for itself: they may not
    share a disk.

    Raises:
        UserError: neither or both are given, a file is missing or not of the model's vocabulary, the folder has no
            tokenizer, or nothing is text.
    """
    if (corpus is None) == (tokens is None):
        raise UserError(f"give either --corpus ({corpus}) or --tokens ({tokens}), the text to profile on")
    vocab_size = read_model_config(folder / "model.json").vocab_size
    if tokens is not None:
        given = TokenFile(tokens, vocab_size=vocab_size)
        check_text(given, folder, vocab_size)
        yield given
        return
    assert corpus is not None, "just checked"
    files = text_files(corpus)
    random.Random(seed).shuffle(files)
    tokenizer = checkpoint.tokenizer_folder(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer for --corpus; give a token file with --tokens")
    with tempfile.TemporaryDirectory() as beside:
        encode_files(files, tokenizer, Path(beside) / "corpus", max_tokens=needed)
        yield TokenFile(Path(beside) / "corpus", vocab_size=vocab_size)


class _Counter:
    """What the routers of this rank chose; windows with even and with odd numbers are counted apart."""

    def __init__(
        self, config: ModelConfig, sequence_length: int, device: torch.device, keep_ids: bool, keep_scores: bool
    ) -> None:
        assert config.moe is not None, "the caller has asked"
        self.experts_of_layer, experts = config.experts_of_layer(), config.moe.num_experts
        layers = len(self.experts_of_layer)
        self.pairs_2LEE = torch.zeros(2, layers, experts, experts, dtype=torch.int64, device=device)
        self.halves: list[tuple[int, float]] = []
        self.first_window = 0
        self._sequence_length, self._keep_ids, self._keep_scores = sequence_length, keep_ids, keep_scores
        self.ids: dict[int, list[Tensor]] = {layer: [] for layer in range(layers)}
        self.scores: dict[int, list[Tensor]] = {layer: [] for layer in range(layers)}

    def __call__(self, x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        """See `model.Watch`."""
        for layer, router in routers.items():
            rows = router.ids_TK.unflatten(0, (-1, self._sequence_length))
            for parity in range(2):
                own = rows[(parity - self.first_window) % 2 :: 2].flatten(0, 1).contiguous()
                ops.count_pairs(own, self.pairs_2LEE[parity, layer])
            if self._keep_ids:
                self.ids[layer].append(router.ids_TK.to("cpu", torch.int16))
            if self._keep_scores:
                missing = self.pairs_2LEE.shape[2] - router.logits_TE.shape[1]
                scores_TE = router.logits_TE.to("cpu", torch.float16)
                self.scores[layer].append(F.pad(scores_TE, (0, missing), value=-math.inf))
        return x

    def total(self, meshes: Meshes) -> NDArray[np.int64]:
        """(2, L, E, E) of all ranks."""
        pairs_2LEE = self.pairs_2LEE.clone()
        dist.all_reduce(pairs_2LEE, group=meshes.world)
        found: NDArray[np.int64] = pairs_2LEE.cpu().numpy()
        return found

    def compare_halves(self, tokens: int, meshes: Meshes) -> None:
        """Note how well the windows with even and with odd numbers agree, all ranks together."""
        even, odd = self.total(meshes)
        own = [(a[:e, :e], b[:e, :e]) for a, b, e in zip(even, odd, self.experts_of_layer, strict=True)]
        found = [one for one in agreement(*zip(*own, strict=True)) if not math.isnan(one)]
        if found:
            self.halves.append((tokens, float(np.mean(found))))

    def of_all(self, kept: dict[int, list[Tensor]], meshes: Meshes) -> NDArray[Any] | None:
        """(L, T, ...) on rank 0: in the order of the passes, and in each in that of the ranks."""
        of_passes = [torch.stack(of_pass) for of_pass in zip(*kept.values(), strict=True)]
        rank, size = dist.get_rank(meshes.world), dist.get_world_size(meshes.world)
        found = []
        for own in of_passes:
            parts = [torch.empty_like(own) for _ in range(size)] if rank == 0 else []
            # As bytes: gloo gathers no int16.
            as_bytes = [part.view(torch.uint8) for part in parts] or None
            dist.gather(own.view(torch.uint8), as_bytes, group=meshes.saving)
            found += [torch.cat(parts, dim=1)] if parts else []
        return torch.cat(found, dim=1).numpy() if rank == 0 else None


def _check(
    folder: Path,
    config: ModelConfig,
    batches: Batches,
    tokens: TokenFile,
    max_tokens: int,
    sequence_length: int,
    num_windows: int,
    world: World,
) -> None:
    if config.is_dense:
        raise UserError(f"{folder} is a dense model, profile counts experts; split it first")
    if num_windows == 0:
        each = f" for each of {world.size} ranks" if world.size > 1 else ""
        raise UserError(f"--max-tokens ({max_tokens}) must be at least one window of {sequence_length} tokens{each}")
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length ({sequence_length}) is longer than the model's positions "
            f"({config.max_position_embeddings}); choose a shorter one"
        )
    if num_windows > batches.num_windows:
        raise UserError(
            f"--max-tokens asks for {num_windows} windows of {sequence_length} tokens, {tokens.bin_path} has "
            f"{batches.num_windows}; ask for fewer or give more text"
        )


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
