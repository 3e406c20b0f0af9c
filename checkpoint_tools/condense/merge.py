"""Merging experts instead, to compare with: fewer of them in a layer, in the manner of M-SMoE (arXiv:2310.01334).

The most used experts of a layer stay. Each other one joins the one whose router logits are most like its own over the
tokens of a corpus, by their cosine; its neurons are brought into that one's order, which changes nothing that it
computes; and a group becomes the mean of its members, weighted by how many tokens chose each. The router keeps the rows
of those that stay, where M-SMoE keeps all and lets experts share weights: what is written is a plain, smaller mixture.

Letters:  T tokens of all texts   E experts   D model dim   F hidden width of an expert
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.assignment import Balanced
from checkpoint_tools.condense.published_json import Shape, read_order
from checkpoint_tools.condense.texts import Texts, read_texts
from checkpoint_tools.condense.unfinished import fingerprint
from checkpoint_tools.condense.weights import routings
from checkpoint_tools.conversion import ToCheckpoint
from checkpoint_tools.source import Source, check_apart, open_source
from ep_engine.deferred import Deferred, Tensors
from ep_engine.entries import expected_entries
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig, first_sentence
from ep_engine.progress import bar

_NAMES = ("w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class MergeOptions:
    """What is merged, on what."""

    experts: int  # that a layer is left with
    layers: int | None = None  # the first of an order; None: all
    max_length: int = 256  # tokens of a text
    max_texts: int | None = None


@dataclass(frozen=True)
class Groups:
    """The experts of a layer that become one each.

    Attributes:
        members: of every group, ascending by the first, the one that is used most.
        counts: tokens that chose each expert of the layer.
    """

    members: list[list[int]]
    counts: list[int]


def prepare(
    source: Path, out: Path, corpus: Sequence[Path], options: MergeOptions, order: Path | None = None
) -> tuple[ToCheckpoint, Texts]:
    """The model with fewer experts in all layers, or in the first of an order, as an engine checkpoint.

    Args:
        source: Hugging Face folder or engine checkpoint with experts.
        out: checkpoint to write.
        corpus: documents on which experts are compared and counted.
        options: how many experts and layers.
        order: file of layers; None: all are merged.

    Raises:
        UserError: the model has no experts, or such as cannot be merged; or as `read_order` and `read_texts`.
        Fault: something that the model computes is not a number.
    """
    check_apart(source, out)
    model = open_source(source)
    shape = Shape.of(model.config)
    if (order is None) != (options.layers is None):
        raise UserError("--layers and --order go together, they say which layers are merged; give both or neither")
    chosen = list(range(shape.layers))
    if order is not None and options.layers is not None:
        if not 1 <= options.layers <= shape.layers:
            raise UserError(f"--layers ({options.layers}) must be in 1..{shape.layers}, the layers with experts")
        chosen = read_order(order, shape, options.layers)
    config = merged_config(model.config, chosen, options.experts)
    texts = read_texts(model, corpus, options.max_length, options.max_texts)
    with bar("layers", model.config.num_layers) as advance:
        groups = group_experts(model, texts, chosen, options.experts, advance)
    tensors = _merged_tensors(model, config, groups)
    largest = max(one.num_bytes for one in tensors.deferred.values())
    conversion = ToCheckpoint(
        source=model,
        out=out,
        tool="condense merge",
        options={
            **asdict(options),
            "groups": {str(layer): one.members for layer, one in groups.items()},
            "counts": fingerprint([one.counts for one in groups.values()]),
        },
        config=config,
        tensors=lambda _: tensors,
        same_names=False,  # layers and experts are counted anew
        held_bytes=9 * largest,  # three matrices of two experts in float32, and scores
        compare=None,
    )
    return conversion, texts


def merged_config(config: ModelConfig, chosen: Sequence[int], count: int) -> ModelConfig:
    """The configuration with `count` experts in some layers, counted among those with experts.

    Raises:
        UserError: a layer has no more experts than that, or something of the model speaks of single experts.
    """
    moe = config.moe
    assert moe is not None, "its shape was asked for"
    fewest = min(moe.experts_in(layer) for layer in chosen)
    if not moe.top_k <= count < fewest:
        raise UserError(
            f"--experts ({count}) must be in top_k..E-1 = {moe.top_k}..{fewest - 1}, for a token still chooses "
            f"{moe.top_k} and a layer has {fewest}; choose it there"
        )
    for what, there in (
        (f"the rule {moe.routing.rule}, whose tables name experts", moe.routing.rule != "topk"),
        ("a gate that is as wide inside as there are experts", moe.gate == "mlp"),
        ("experts of different widths", moe.expert_sizes is not None),
    ):
        if there:
            raise UserError(f"the model has {what}, so experts cannot be merged; give a model without")
    each = [count if i in chosen else number for i, number in enumerate(config.experts_of_layer())]
    plain = config.model_dump()
    plain["moe"] |= {"num_experts": max(each), "experts_of_layer": each if len(set(each)) > 1 else None}
    try:
        return ModelConfig.model_validate(plain)
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None


def group_experts(
    model: Source,
    texts: Texts,
    chosen: Sequence[int],
    count: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, Groups]:
    """The groups of some layers, counted among those with experts, in one pass over the texts."""
    found = {}
    for index, routing in enumerate(routings(model, texts, advance)):
        if index in chosen:
            logits_ET = F.normalize(routing.logits_TE.T.double(), dim=1)
            counts = routing.ids_TK.flatten().bincount(minlength=len(logits_ET))
            found[index] = Groups(grouped(counts, logits_ET @ logits_ET.T, count), counts.tolist())
    return found


def grouped(count_E: Tensor, alike_EE: Tensor, count: int) -> list[list[int]]:
    """The `count` most used experts, each followed by those that are most like it; of equals the smaller id."""
    centers = count_E.argsort(descending=True, stable=True)[:count].sort().values
    members = {int(center): [int(center)] for center in centers}
    for expert in range(len(count_E)):
        if expert not in members:
            members[int(centers[alike_EE[expert, centers].argmax()])].append(expert)
    return list(members.values())


def _merged_tensors(model: Source, config: ModelConfig, groups: Mapping[int, Groups]) -> Tensors:
    layers, known = model.config.moe_layers(), model.tensors.deferred
    whole = model.hashed()
    of_layer = {layers[index]: (one, Order(whole, layers[index])) for index, one in groups.items()}
    deferred: dict[str, Deferred] = {}
    for entry, shape in expected_entries(config).items():
        _, number, rest = entry.split(".", 2) if entry.startswith("layers.") else ("", "", "")
        deferred[entry] = known[entry]
        if not number or int(number) not in of_layer:
            continue
        one, order = of_layer[int(number)]
        if rest.startswith("moe.experts."):
            _, _, expert, name = rest.split(".")
            deferred[entry] = _mean(whole, order, one, one.members[int(expert)], name)
        elif known[entry].shape != shape:  # of the router, a row for each expert
            deferred[entry] = _rows(whole, entry, [members[0] for members in one.members])
    return Tensors(deferred)


def _rows(whole: Tensors, entry: str, ids: list[int]) -> Deferred:
    was = whole.deferred[entry]
    return Deferred((len(ids), *was.shape[1:]), was.dtype, lambda: whole[entry][ids].contiguous())


class Order:
    """Neurons of experts of one layer, in the order of another's: found once for all three matrices."""

    def __init__(self, whole: Tensors, layer: int) -> None:
        self.at = f"layers.{layer}.moe.experts"
        self._whole, self._layer = whole, layer
        self.like = cache(self._like)

    def _like(self, center: int, expert: int) -> Tensor:
        """(F,): which neuron of `expert` belongs where `center` has its first, its second, ...

        By the largest sum of products of their weights (arXiv:2209.04836 section 3.2).

        Raises:
            Fault: a weight is not a number.
        """
        score_FF = sum(self._neurons(center, name) @ self._neurons(expert, name).T for name in _NAMES)
        assert isinstance(score_FF, Tensor), "a sum of three"
        if not score_FF.isfinite().all():
            raise Fault(
                f"experts {center} and {expert} of layer {self._layer} have weights that are not numbers; check the "
                "model's weights"
            )
        return torch.from_numpy(Balanced(*score_FF.shape).assign(-score_FF.numpy()))

    def _neurons(self, expert: int, name: str) -> Tensor:
        weight = self._whole[f"{self.at}.{expert}.{name}"].float()
        return weight.T if name == "w_down" else weight


def _mean(whole: Tensors, order: Order, groups: Groups, members: Sequence[int], name: str) -> Deferred:
    """One matrix of a merged expert."""
    center, dim = members[0], 1 if name == "w_down" else 0
    was = whole.deferred[f"{order.at}.{center}.{name}"]
    total = sum(groups.counts[e] for e in members)
    # Members are never used more than their center: without a count none has one, and the center stays as it is.
    shares = {e: groups.counts[e] / total for e in members if groups.counts[e]} if total else {center: 1.0}

    def make() -> Tensor:
        mean = torch.zeros(was.shape)
        for expert, share in shares.items():
            weight = whole[f"{order.at}.{expert}.{name}"].float()
            if expert != center:
                weight = weight.index_select(dim, order.like(center, expert))
            mean += share * weight
        return mean.to(was.dtype)

    return Deferred(was.shape, was.dtype, make)
