"""Step 2b: which layers to condense, one after the other, each the best beside those before it.

A candidate is a set of condensed layers, judged by the hidden states after the final norm. All candidates of a step go
through the model together, layer by layer: those that agree below a layer share their hidden states there, so that each
re-runs only what is above its lowest difference, and weights are read once a step. For comparison a layer may be
dropped instead: its experts alone, or the whole block.

Shape letters:  T tokens of all texts   D model dim   L layers with experts
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.condense.objectives import Objective, distances_to
from checkpoint_tools.condense.published_json import Shape, read_experts, read_weights, write_json
from checkpoint_tools.condense.texts import Texts, attended_texts, checked, embedded, read_texts
from checkpoint_tools.condense.unfinished import Unfinished, ranks_of
from checkpoint_tools.forward import beside, expert_output, feed_forward, normed
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Positions
from ep_engine.errors import Fault, UserError
from ep_engine.mesh import World
from ep_engine.progress import bar

Instead = Literal["condensed", "layer-drop", "block-drop"]
Set = frozenset[int]
_NOTHING: Set = frozenset()
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class LayerOptions:
    """How layers are searched for."""

    layers: int
    experts: int
    beam: int = 1
    instead: Instead = "condensed"
    objective: Objective = "js"
    max_length: int = 256  # tokens of a text
    max_texts: int | None = None
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Kept:
    """What stays of a layer if it is condensed: experts, and the weights that they have for every token."""

    experts: list[list[int]]  # of every layer with experts
    weight_LE: Tensor  # float64
    instead: Instead = "condensed"


class Search:
    """A model on some texts, and how far it is from itself with some layers condensed.

    Attributes:
        layer_forwards: layers that were run over all texts so far, by this rank.
    """

    def __init__(
        self,
        model: Source,
        texts: Texts,
        kept: Kept,
        *,
        objective: Objective = "js",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.layer_forwards = 0
        self._model, self._texts, self._kept, self._group = model, texts, kept, group
        self._objective: Objective = objective
        self._positions = Positions(model.config)
        original_TD = self._final_states([_NOTHING])[_NOTHING]
        self._original_TD = checked(original_TD, texts, "the final norm")

    def distances(self, sets: Sequence[Set]) -> list[float]:
        """Of the final hidden states, for each set of condensed layers; ranks share the sets, and get all distances."""
        rank, size = (0, 1) if self._group is None else (dist.get_rank(self._group), dist.get_world_size(self._group))
        found = torch.zeros(len(sets), dtype=torch.float64)
        # Neighbours share the most, so a rank takes neighbours.
        mine = range(rank * len(sets) // size, (rank + 1) * len(sets) // size)
        states = self._final_states([sets[i] for i in mine])
        for i in mine:
            found[i] = self._distance(states[sets[i]])
        if self._group is not None:
            dist.all_reduce(found, group=self._group)
        return found.tolist()

    def _distance(self, other_TD: Tensor) -> float:
        total = 0.0
        for first in range(0, self._texts.num_tokens, _TOKENS_AT_ONCE):
            part = slice(first, first + _TOKENS_AT_ONCE)
            distance = distances_to(self._objective, self._original_TD[part])
            total += float(distance(other_TD[part]).double() @ self._texts.shares[part])
        return total

    @torch.no_grad()
    def _final_states(self, sets: Sequence[Set]) -> dict[Set, Tensor]:
        """(T, D) after the final norm, for each set of condensed layers."""
        config, tensors = self._model.config, self._model.tensors
        states = {_NOTHING: embedded(self._model, self._texts)} if sets else {}
        for layer in range(config.num_layers if sets else 0):
            if config.moe_of(layer) is None:
                states = self._plain(states, layer)
            else:
                index = config.moe_index(layer)
                below = {frozenset(i for i in one if i < index) for one in sets if index not in one}
                changed = {frozenset(i for i in one if i < index) for one in sets if index in one}
                found = self._plain({one: states[one] for one in states if one in below}, layer)
                of_changed = self._condensed({one: states[one] for one in states if one in changed}, layer)
                states = found | {one | {index}: x_TD for one, x_TD in of_changed.items()}
            if _NOTHING in states:  # the original, which must be numbers; a candidate need not
                checked(states[_NOTHING], self._texts, f"layer {layer}")
        return {one: normed(x_TD, config, tensors, "norm") for one, x_TD in states.items()}

    def _attended(self, states: Mapping[Set, Tensor], layer: int) -> Tensor:
        self.layer_forwards += len(states)
        together_TD = torch.cat(list(states.values()))
        return attended_texts(together_TD, self._texts.times(len(states)), self._model, self._positions, layer)

    def _plain(self, states: Mapping[Set, Tensor], layer: int) -> dict[Set, Tensor]:
        if not states:
            return {}
        x_TD = self._attended(states, layer)
        x_TD = x_TD + feed_forward(x_TD.unsqueeze(0), self._model.config, self._model.tensors, layer)[0]
        return self._apart(states, x_TD)

    def _condensed(self, states: Mapping[Set, Tensor], layer: int) -> dict[Set, Tensor]:
        if not states or self._kept.instead == "block-drop":
            return dict(states)
        x_TD = self._attended(states, layer)
        if self._kept.instead == "condensed":
            config, tensors = self._model.config, self._model.tensors
            moe, index = config.moe_of(layer), config.moe_index(layer)
            assert moe is not None, "the caller has asked"
            h_TD = normed(x_TD, config, tensors, f"layers.{layer}.ffn_norm")
            x_TD = x_TD + beside(h_TD, moe, layer, tensors)
            for e in self._kept.experts[index]:
                x_TD = x_TD + float(self._kept.weight_LE[index, e]) * expert_output(h_TD, layer, e, tensors)
        return self._apart(states, x_TD)

    def _apart(self, states: Mapping[Set, Tensor], x_TD: Tensor) -> dict[Set, Tensor]:
        return dict(zip(states, x_TD.split(self._texts.num_tokens), strict=True))


def order_layers(
    search: Search,
    num_layers: int,
    count: int,
    *,
    beam: int = 1,
    begun: Sequence[Sequence[int]] = ((),),
    advance: Callable[[list[list[int]], list[float]], None] = lambda *_: None,
) -> list[int]:
    """The first `count` layers to condense, in order; with beam 1 the first n of it are what a search for n finds.

    Args:
        search: what judges a set.
        num_layers: L.
        count: 1..L.
        beam: orders that are kept from step to step; the same layers in another order are kept once.
        begun: orders to go on from, the best first.
        advance: called after each step with the orders that were kept, and how far each is.

    Raises:
        Fault: no candidate of a step has a distance that is a number.
    """
    orders = [list(order) for order in begun]
    while len(orders[0]) < count:
        candidates: dict[Set, list[int]] = {}
        for order in orders:
            for layer in range(num_layers):
                if layer not in order:
                    candidates.setdefault(frozenset((*order, layer)), [*order, layer])
        distances = search.distances(list(candidates))
        # Sorting is stable: of equal ones the first stays first.
        good = [pair for pair in zip(distances, candidates.values(), strict=True) if not math.isnan(pair[0])]
        best = sorted(good, key=lambda pair: pair[0])[:beam]
        if not best:
            raise Fault(
                f"with {len(orders[0]) + 1} layers condensed no final hidden state is a number; check the model's "
                "weights"
            )
        orders = [order for _, order in best]
        advance(orders, [distance for distance, _ in best])
    return orders[0]


def run_layers(
    folder: Path,
    corpus: Sequence[Path],
    files: tuple[Path | None, Path | None],
    out: Path,
    options: LayerOptions,
    *,
    resume: bool = False,
) -> tuple[list[int], list[float]] | None:
    """Write the order of layers, on all ranks that torchrun has started; None on others than the first.

    Args:
        folder: the model.
        corpus: documents.
        files: weights and lists of experts; None where none are needed.
        out: file to write.
        options: how to search.
        resume: go on with what an interrupted run left.

    Returns:
        The order, and how far the model is from the original after each step.

    Raises:
        UserError: the model has fewer layers, or as the readers of files and texts.
        Fault: as `order_layers`.
    """
    model, world = open_source(folder), World.from_environment()
    shape = Shape.of(model.config)
    if options.layers > shape.layers:
        raise UserError(
            f"--layers ({options.layers}) is more than the {shape.layers} layers with experts of {folder}; choose fewer"
        )
    kept = read_kept(files, shape, options.experts, options.instead)
    texts = read_texts(model, corpus, options.max_length, options.max_texts)
    about = {**asdict(options), "texts": [ids.tolist() for ids in texts.ids], "experts": kept.experts,
             "weights": kept.weight_LE.tolist()}  # fmt: skip
    unfinished = Unfinished(out, "layers", folder, about, resume=resume)
    begun, steps = unfinished.found.get("orders", [[]]), list[float](unfinished.found.get("distances", []))
    with ranks_of(world, options.timeout_s) as group, bar("layers", options.layers, show=world.rank == 0) as advance:

        def keep(orders: list[list[int]], distances: list[float]) -> None:
            steps.append(distances[0])
            advance(len(steps))
            if world.rank == 0:
                unfinished.keep({"orders": orders, "distances": steps})

        search = Search(model, texts, kept, objective=options.objective, group=group)
        order = order_layers(search, shape.layers, options.layers, beam=options.beam, begun=begun, advance=keep)
    if world.rank != 0:
        return None
    write_json(out, order)
    unfinished.remove()
    return order, steps


def read_kept(files: tuple[Path | None, Path | None], shape: Shape, count: int, instead: Instead) -> Kept:
    """What stays of condensed layers, from the files of weights and of lists.

    Raises:
        UserError: a file is missing, of another model, or has no effect; a weight is of an expert that nobody chose.
    """
    weights, lists = files
    if instead != "condensed" or count == 0:
        if count or weights is not None or lists is not None:
            what = f"--instead {instead}" if instead != "condensed" else "--experts 0"
            raise UserError(f"--experts, --weights and --lists have no effect on {what}; leave them out")
        return Kept([[]] * shape.layers, torch.zeros(shape.layers, shape.experts, dtype=torch.float64), instead)
    if weights is None or lists is None:
        raise UserError(f"--experts {count} needs --weights and --lists, which say which experts stay; give both")
    experts, means_LE = read_experts(lists, shape, count), read_weights(weights, shape).means
    for layer, row in enumerate(experts):
        for e in row:
            if means_LE[layer, e].isnan():
                raise UserError(
                    f"{weights} says that no token chose expert {e} of layer {layer}, which {lists} keeps, so it has "
                    "no weight; count weights on more text, or search again"
                )
    return Kept(experts, means_LE)
