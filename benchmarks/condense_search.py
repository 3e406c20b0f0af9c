"""What does one cached pass per layer save, against the published search, a forward of the model for every candidate?

Both choose by the same function of hidden states; tests compare it with another. Forwards of the brute force are
counted by a hook on the model, passes of layers by ours by a hook on attention, which is the first that a layer does.
The published search of layers is not run: its forwards are counted on paper.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from checkpoint_tools.condense.experts import Choice, choose_experts
from checkpoint_tools.condense.layers import Kept, Search, order_layers
from checkpoint_tools.condense.objectives import distances_to
from checkpoint_tools.condense.published_json import Shape, read_weights
from checkpoint_tools.condense.texts import Texts, read_texts
from checkpoint_tools.forward import beside, expert_output
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Attention
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of


class BruteForce:
    """The published search, whose candidates are forwards of the whole model."""

    def __init__(self, source: Source, texts: Texts) -> None:
        self.source, self.tokens_BS = source, torch.stack(texts.ids)
        self.model = Decoder(source.config)
        for name, shard in entries_of([self.model]).items():
            shard.tensor.copy_(source.tensors[name])
        self.forwards = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1

    @torch.no_grad()
    def choose(self, index: int, weight_E: Tensor, count: int) -> Choice:
        """The experts of one layer."""
        layer = self.source.config.moe_layers()[index]
        block = self.model.layers[str(layer)].moe
        watched = self.model.norm if layer == self.source.config.num_layers - 1 else self.model.layers[str(layer)]
        seen: list[Tensor] = []

        def keep(_module: object, _given: object, out: Tensor | tuple[Tensor, object]) -> None:
            seen[:] = [(out[0] if isinstance(out, tuple) else out).flatten(0, 1)]

        hook, usual = watched.register_forward_hook(keep), block.forward
        self.model(self.tokens_BS)
        distance, chosen, distances = distances_to("js", seen[0]), list[int](), list[float]()
        while len(chosen) < count:
            found = []
            for e in (e for e in range(len(weight_E)) if e not in chosen and not weight_E[e].isnan()):
                block.forward = self._condensed(layer, [*chosen, e], weight_E)
                self.model(self.tokens_BS)
                found.append((float(distance(seen[0]).double().mean()), e))
            chosen.append(min(found)[1])
            distances.append(min(found)[0])
        block.forward = usual
        hook.remove()
        return Choice(chosen, distances)

    def _condensed(self, layer: int, experts: list[int], weight_E: Tensor) -> Callable[..., tuple[Tensor, None]]:
        moe, tensors = self.source.config.moe_of(layer), self.source.tensors
        assert moe is not None, "it is searched"

        def forward(x_TD: Tensor, *_: object, **_named: object) -> tuple[Tensor, None]:
            y_TD = beside(x_TD, moe, layer, tensors)
            for e in experts:
                y_TD = y_TD + float(weight_E[e]) * expert_output(x_TD, layer, e, tensors)
            return y_TD, None

        return forward


def compare_searches(
    _rank: int, folder: Path, corpus: Path, weights_file: Path, experts: int, texts: tuple[int, int]
) -> dict[str, Any]:
    """Both searches for experts, on one thread; in a process of its own for the peak memory.

    Args:
        folder: checkpoint.
        corpus: documents.
        weights_file: of all of them.
        experts: of a layer.
        texts: how many of the documents, and how many tokens of each; all have so many.

    Returns:
        Choices of ours, seconds, forwards, `forward_passes_ratio` (forwards of the published search for a layer, over
        passes of a layer by ours), `search_speedup`, `same_choices`, `distances_apart` (how far both searches ended,
        relative to the distance; of near ties float32 may choose either), and peaks of resident memory.
    """
    imported, (source, weights, compared) = _peak_mb(), _opened(folder, corpus, weights_file, texts)
    num_layers, moe_layers = source.config.num_layers, len(weights)
    begin = time.perf_counter()
    with _passes_of_layers(compared) as passes:
        ours = [choice for _, choice in choose_experts(source, compared, weights, experts)]
    searched, peak = time.perf_counter(), _peak_mb()
    brute = BruteForce(source, compared)
    theirs = [brute.choose(index, weights[index], experts) for index in range(moe_layers)]
    forced = time.perf_counter()
    same = [one.experts == other.experts for one, other in zip(ours, theirs, strict=True)]
    return {
        "choices": [choice.experts for choice in ours],
        "seconds": searched - begin,
        "seconds_of_brute_force": forced - searched,
        "search_speedup": (forced - searched) / (searched - begin),
        "layer_passes": sum(passes),  # of all texts, also through layers without experts
        "forward_passes_of_brute_force": brute.forwards,
        "forward_passes_ratio": (brute.forwards / moe_layers) / (sum(passes) / num_layers),
        "same_choices": all(same),
        "layers_with_same_choices": sum(same),
        "distances_apart": max(_apart(one, other) for one, other in zip(ours, theirs, strict=True)),
        "never_chosen": int(weights.isnan().sum()),  # experts that are no candidates
        "imported_MB": imported,
        "peak_resident_MB": peak,
        "brute_force_peak_resident_MB": _peak_mb(),
    }


def search_layers(
    _rank: int, folder: Path, corpus: Path, weights_file: Path, lists: list[list[int]], texts: tuple[int, int]
) -> dict[str, Any]:
    """Our search for layers, whose condensed layers have `lists`; else as `compare_searches`, in another process."""
    imported, (source, weights, compared) = _peak_mb(), _opened(folder, corpus, weights_file, texts)
    moe_layers, begin = len(weights), time.perf_counter()
    search = Search(source, compared, Kept(lists, weights))
    order_layers(search, moe_layers, moe_layers)
    return {
        "seconds": time.perf_counter() - begin,
        "layer_forwards": search.layer_forwards,
        # A forward for every candidate of every step, as published, and one of the original.
        "layer_forwards_of_brute_force": (1 + moe_layers * (moe_layers + 1) // 2) * source.config.num_layers,
        "imported_MB": imported,
        "peak_resident_MB": _peak_mb(),
    }


def _opened(folder: Path, corpus: Path, weights_file: Path, texts: tuple[int, int]) -> tuple[Source, Tensor, Texts]:
    source, (count, length) = open_source(folder), texts
    weights = read_weights(weights_file, Shape.of(source.config)).means
    compared = read_texts(source, [corpus], length, count)
    assert set(compared.lengths) == {length}, "rows are stacked"
    return source, weights, compared


@contextmanager
def _passes_of_layers(texts: Texts) -> Iterator[Sequence[float]]:
    """Within the block a list grows by the share of all texts in every call of a layer's attention."""
    passes: list[float] = []

    def count(module: object, given: tuple[Any, ...], _out: object) -> None:
        if isinstance(module, Attention):
            passes.append(len(given[0]) / len(texts.ids))

    hook = register_module_forward_hook(count)
    yield passes
    hook.remove()


def _apart(one: Choice, other: Choice) -> float:
    return abs(one.distances[-1] - other.distances[-1]) / other.distances[-1]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
