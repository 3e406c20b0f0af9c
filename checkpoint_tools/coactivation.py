"""Co-activation split: neurons that are active for the same tokens share an expert (MoEfication, arXiv:2110.01786).

    text -> hidden features of every layer -> co-activation -> graph -> METIS -> equal experts

The counts are those of LLaMA-MoE's published code: C = F^T F over the tokens of a part of the text, clipped, summed
over parts. An edge is a pair that is active together more than most.

Shape letters:  T tokens of a part   N neurons   E experts   S = N / E
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from checkpoint_tools.assignment import Balanced, Neurons
from checkpoint_tools.forward import attended, normed
from checkpoint_tools.kernels import KERNELS, Kernel
from ep_engine.attention import Positions
from ep_engine.deferred import Tensors
from ep_engine.model_config import ModelConfig

_DECILES = range(1, 11)
_LOWER = 0.99  # of the threshold, so that what equals it has an edge
_MOST = 1 << 30  # sum of all weights of a graph: METIS counts in 32 bits
_ROWS = 512  # of the matrix that are looked at together


@dataclass(frozen=True)
class Cut:
    """Share of the graph's weight that lies between experts."""

    partitioned: float  # as METIS left it
    balanced: float  # after neurons moved to make experts equal


@torch.no_grad()
def hidden_features(
    config: ModelConfig, tensors: Tensors, parts: list[Tensor], *, gate_alone: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """What goes into every w_down, (T, N) float32, layer by layer and part by part; weights are read once.

    Args:
        config: a dense model.
        tensors: its entries.
        parts: ids of the text, (B, S) each.
        gate_alone: silu(w_gate x) without w_up x.
    """
    positions = Positions(config)
    states = [F.embedding(part, tensors["embed.weight"]).float() for part in parts]
    for layer in range(config.num_layers):
        names = ("w_gate", "w_up", "w_down")
        w_gate, w_up, w_down = (tensors[f"layers.{layer}.ffn.{name}.weight"].float() for name in names)
        for number, x_BSD in enumerate(states):
            x_BSD = attended(x_BSD, config, tensors, positions, layer)
            h_BSD = normed(x_BSD, config, tensors, f"layers.{layer}.ffn_norm")
            gate = F.silu(F.linear(h_BSD, w_gate))
            hidden = gate * F.linear(h_BSD, w_up)
            yield layer, (gate if gate_alone else hidden).flatten(0, 1)
            states[number] = x_BSD + F.linear(hidden, w_down)


class CoActivation:
    """How much each pair of neurons of a layer is active together.

    Args:
        width: N.
        kernel: what a feature counts: itself, its absolute value or its square.
        most: to which the sum over the tokens of one part is clipped.
    """

    def __init__(self, width: int, kernel: Kernel, most: float) -> None:
        self.sum_NN = torch.zeros(width, width)
        self._kernel, self._most = kernel, most

    def add(self, features_TN: Tensor) -> None:
        """Count one part of the text."""
        counted = KERNELS[self._kernel](features_TN)
        self.sum_NN += (counted.t() @ counted).clamp_(max=self._most)


@dataclass(frozen=True)
class Graph:
    """Edges of every neuron in compressed rows, both directions, with weights of at least 1."""

    begin: NDArray[np.int32]
    neighbour: NDArray[np.int32]
    weight: NDArray[np.int32]

    @classmethod
    def of(cls, sum_NN: NDArray[np.float32]) -> "Graph":
        """Pairs at least as active as the first decile of all that is not 0; weights are whole multiples of it.

        Where their sum would be more than METIS can count, all are made smaller alike, but none less than 1.
        """
        width, least = len(sum_NN), _threshold(sum_NN)
        count_N, total = np.zeros(width, np.int64), 0.0
        for first in range(0, width, _ROWS):
            relative = _relative(sum_NN, first, least)
            count_N[first : first + _ROWS] = np.count_nonzero(relative, axis=1)
            total += float(relative.sum(dtype=np.float64))
        begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(count_N)])
        graph = cls(begin.astype(np.int32), np.empty(begin[-1], np.int32), np.empty(begin[-1], np.int32))
        shrink = np.float32(max(1.0, total / _MOST))
        for first in range(0, width, _ROWS):
            relative = _relative(sum_NN, first, least)
            row, column = np.nonzero(relative)
            edges = slice(begin[first], begin[min(first + _ROWS, width)])
            graph.neighbour[edges] = column
            graph.weight[edges] = np.maximum(relative[row, column] / shrink, 1)
        return graph

    def partition(self, num_experts: int, seed: int) -> tuple[Neurons, Cut]:
        """Equal experts with few and light edges between them: METIS, then an exact balance."""
        import pymetis

        width = len(self.begin) - 1
        if len(self.neighbour) and num_experts > 1:
            options = pymetis.Options(seed=seed)
            adjacency = pymetis.CSRAdjacency(self.begin, self.neighbour)
            found = pymetis.part_graph(num_experts, adjacency, eweights=self.weight, options=options)
            label_N = np.array(found.vertex_part, dtype=np.int64)
        else:
            label_N = np.arange(width, dtype=np.int64) * num_experts // width
        held_NE = self._held(label_N, num_experts)
        own_N = held_NE[np.arange(width), label_N]
        balanced_N = Balanced(width, num_experts).assign(own_N[:, None] - held_NE)
        total = max(float(self.weight.sum(dtype=np.float64)), 1.0)
        kept_N = self._held(balanced_N, num_experts)[np.arange(width), balanced_N]
        cut = Cut(1 - float(own_N.sum()) / total, 1 - float(kept_N.sum()) / total)
        return [np.flatnonzero(balanced_N == expert) for expert in range(num_experts)], cut

    def _held(self, label_N: NDArray[np.int64], num_experts: int) -> NDArray[np.float64]:
        """(N, E): weight of each neuron's edges to the neurons of each expert."""
        width = len(self.begin) - 1
        held_NE = np.zeros((width, num_experts))
        for first in range(0, width, _ROWS):
            last = min(first + _ROWS, width)
            edges = slice(self.begin[first], self.begin[last])
            row = np.repeat(np.arange(last - first), np.diff(self.begin[first : last + 1]))
            place = row * num_experts + label_N[self.neighbour[edges]]
            sums = np.bincount(place, weights=self.weight[edges], minlength=(last - first) * num_experts)
            held_NE[first:last] = sums.reshape(last - first, num_experts)
        return held_NE


def _threshold(sum_NN: NDArray[np.float32]) -> float:
    """The first of the deciles of all entries that is not 0, a little less; 0 if all are."""
    flat = sum_NN.ravel()
    places = [decile / 10 * (flat.size - 1) for decile in _DECILES]
    ranks = sorted({int(np.floor(place)) for place in places} | {int(np.ceil(place)) for place in places})
    sorted_there = np.partition(flat, ranks)
    for place in places:
        low, high = (float(sorted_there[int(rank)]) for rank in (np.floor(place), np.ceil(place)))
        value = low + (high - low) * float(place - np.floor(place))
        if value != 0:
            return _LOWER * value
    return 0.0


def _relative(sum_NN: NDArray[np.float32], first: int, least: float) -> NDArray[np.float32]:
    """Some rows as whole multiples of the threshold; 0 where there is no edge."""
    if least <= 0:
        return np.zeros((min(_ROWS, len(sum_NN) - first), len(sum_NN)), np.float32)
    relative: NDArray[np.float32] = np.floor(sum_NN[first : first + _ROWS] / np.float32(least))
    number = np.arange(len(relative))
    relative[number, first + number] = 0
    return np.maximum(relative, 0, out=relative)
