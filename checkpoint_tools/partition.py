"""Which neurons belong to which expert: every way of LLaMA-MoE to cut an FFN (arXiv:2406.16554 section 3.1).

`random`: every layer has a shuffle of its own. `clustering`: neurons with similar rows of w_up or w_gate share an
expert. `coactivation`: neurons that are active for the same tokens. `gradient`: neurons go to the expert whose cluster
of a corpus needs them most. `published`: as files say.

Shapes: N neurons, D model dim, E experts, F = N / E.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from checkpoint_tools.assignment import Neurons, greedy, optimal, residual, shared
from checkpoint_tools.balanced_kmeans import Metric, balanced_kmeans
from checkpoint_tools.coactivation import CoActivation, Cut, Graph, hidden_features
from checkpoint_tools.documents import rows_of_text
from checkpoint_tools.importance import Importance
from checkpoint_tools.kernels import Kernel
from checkpoint_tools.source import Source
from checkpoint_tools.split_files import covers_once, file_of, read_split_file
from ep_engine.errors import UserError

Method = Literal["random", "clustering", "coactivation", "gradient", "published"]
Projection = Literal["up_proj", "gate_proj"]
Assignment = Literal["optimal", "greedy", "shared"]

_WAYS = {"greedy": greedy, "shared": shared}
_PART_TOKENS = 4096  # counted, and clipped, together
_PARTITION = 0  # a stream of random numbers of its own: the gate does not depend on it


# Options that a method reads, and one without which there is nothing to read.
_READ: dict[Method, tuple[str, ...]] = {
    "random": (),
    "clustering": ("metric", "on", "reference_compat"),
    "coactivation": ("on", "corpus", "max_tokens", "sequence_length", "kernel", "most"),
    "gradient": ("on", "importance", "assignment", "expert_size", "reference_compat"),
    "published": ("on", "files"),
}
_NEEDED: dict[Method, dict[str, str]] = {
    "gradient": {"importance": "the folder of scores"},
    "published": {"files": "the folder of split files"},
    "coactivation": {"corpus": "the text that neurons are watched on"},
}


@dataclass(frozen=True)
class PartitionOptions:
    """How neurons are given to experts."""

    method: Method = "random"
    metric: Metric = "l2"  # of clustering, between rows of length one
    on: Projection = "up_proj"  # whose rows are clustered, whose importance is read
    files: Path | None = None  # of published: folder of split files
    importance: Path | None = None  # of gradient: folder of importance files
    assignment: Assignment = "optimal"  # of gradient
    expert_size: int | None = None  # S of assignment shared; None: an equal share
    corpus: tuple[Path, ...] = ()  # of coactivation: documents
    max_tokens: int = 16384  # of the corpus
    sequence_length: int = 512
    kernel: Kernel = "l1_norm"  # what a feature counts
    most: float = 1.0  # to which a pair's count in one part of the text is clipped
    reference_compat: bool = False  # as the published code: clusters ordered as text, and l2 whatever the metric says

    def check(self) -> None:
        """Refuse what the method does not read, by its name on the command line, and a method without what it needs.

        Raises:
            UserError: naming the option.
        """
        for option in fields(self)[1:]:
            if getattr(self, option.name) != option.default and option.name not in _READ[self.method]:
                name = "threshold" if option.name == "most" else option.name.replace("_", "-")
                raise UserError(f"--{name} has no effect on --method {self.method}; leave it out")
        if self.expert_size is not None and self.assignment != "shared":
            raise UserError(
                f"--expert-size {self.expert_size} has no effect on --assignment {self.assignment}, which gives every "
                "neuron to one expert; leave it out"
            )
        for needed, what in _NEEDED.get(self.method, {}).items():
            if not getattr(self, needed):
                raise UserError(f"--method {self.method} needs --{needed}, {what}; give it")

    def about(self) -> dict[str, Any]:
        """The options that the method reads, for split.json."""
        own: dict[str, dict[str, Any]] = {
            "random": {},
            "published": {"files": str(self.files), "on": self.on},
            "clustering": {"metric": self.metric, "on": self.on},
            "coactivation": {
                "corpus": [str(path) for path in self.corpus],
                "max_tokens": self.max_tokens,
                "sequence_length": self.sequence_length,
                "kernel": self.kernel,
                "threshold": self.most,
                "on": self.on,
            },
            "gradient": {"importance": str(self.importance), "on": self.on, "assignment": self.assignment},
        }
        if self.expert_size is not None:
            own["gradient"]["expert_size"] = self.expert_size
        compat = {"reference_compat": True} if self.reference_compat else {}
        return {"method": self.method, **own[self.method], **compat}


class Partitioner:
    """Gives the neurons of every expert of a layer.

    Args:
        options: how.
        num_experts: E.
        width: N, which the number of all experts divides unless sizes are told otherwise.
        seed: of shuffles and of first centres.
        residual: experts that every token goes through, which come first.

    Raises:
        UserError: there are not as many clusters of scores as experts.
    """

    def __init__(self, options: PartitionOptions, num_experts: int, width: int, seed: int, residual: int = 0) -> None:
        self._options, self._num_experts, self._width, self._seed = options, num_experts, width, seed
        self._residual, self._size = residual, options.expert_size or width // (num_experts + residual)
        self._scores = None
        if options.importance is not None:
            self._scores = Importance(
                options.importance, options.on, num_experts, width, residual, by_text=options.reference_compat
            )

    def covers_once(self, num_layers: int) -> bool:
        """Whether every neuron of every layer will be in one expert; UserError for a bad file."""
        options = self._options
        if options.files is not None:
            return all(covers_once(self.layer(layer, {}), self._width) for layer in range(num_layers))
        return options.method != "gradient" or options.assignment != "shared"

    def from_text(self, source: Source) -> Iterator[tuple[int, Neurons, Cut]]:
        """The neurons of every expert of all layers, in order, by what is active on the corpus, and the cuts.

        Raises:
            UserError: the model has no tokenizer, or the corpus is shorter than one row.
        """
        options = self._options
        parts = _parts(source, options)
        features = hidden_features(source.config, source.tensors, parts, gate_alone=options.on == "gate_proj")
        for layer, of_layer in groupby(features, key=lambda found: found[0]):
            counted = CoActivation(self._width, options.kernel, options.most)
            for _, features_TN in of_layer:
                counted.add(features_TN)
            graph = Graph.of(counted.sum_NN.numpy())
            del counted
            yield layer, *graph.partition(self._num_experts, self._seed)

    def layer(self, layer: int, ffn: Mapping[str, Tensor]) -> Neurons:
        """The neurons of every expert, ascending; of files in the order of the file, and where published files are
        lists the most important first. UserError for a bad file.
        """
        options = self._options
        if options.files is not None:
            total = self._num_experts + self._residual
            return read_split_file(file_of(options.files, layer, options.on), total, self._width)
        if self._scores is not None:
            return self._by_scores(self._scores.layer(layer))
        if options.method == "random":
            return random_partition(self._width, self._num_experts, self._seed, layer)
        rows_ND = F.normalize(ffn["w_up" if options.on == "up_proj" else "w_gate"].float(), dim=1)
        metric = "l2" if options.reference_compat else options.metric
        clusters = balanced_kmeans(rows_ND, self._num_experts, metric=metric, seed=self._seed)
        return [np.flatnonzero(clusters.label_N == expert) for expert in range(self._num_experts)]

    def _by_scores(self, score_EN: NDArray[np.float64]) -> Neurons:
        """First what is common, then each expert's own."""
        common = residual(score_EN, self._size, self._residual) if self._residual else []
        free_N = np.ones(self._width, dtype=bool)
        free_N[np.concatenate([np.empty(0, np.int64), *common])] = False
        way = self._options.assignment
        own = optimal(score_EN, free_N) if way == "optimal" else _WAYS[way](score_EN, self._size, free_N)
        if not common and way != "shared":
            return [np.sort(neurons) for neurons in own]
        return [*common, *(n[np.argsort(-score_N[n], kind="stable")] for n, score_N in zip(own, score_EN, strict=True))]


def _parts(source: Source, options: PartitionOptions) -> list[Tensor]:
    """The corpus in parts of whole rows, (B, S)."""
    rows = rows_of_text([source], options.corpus, options.sequence_length, options.max_tokens)
    together = max(1, _PART_TOKENS // options.sequence_length)
    return [torch.stack(rows[at : at + together]) for at in range(0, len(rows), together)]


def random_partition(width: int, num_experts: int, seed: int, layer: int) -> Neurons:
    """E index sets of N / E neurons each, int64, ascending within an expert."""
    shuffled = np.random.default_rng([seed, _PARTITION, layer]).permutation(width)
    return [np.sort(part) for part in np.split(shuffled, num_experts)]
