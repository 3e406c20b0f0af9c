"""Step 2a: which experts of a layer stay, one after the other, each the best beside those chosen before.

A candidate is the layer with the shared experts and some of its own, each with a fixed weight, for every token. What is
below the layer is unchanged and the residual stream adds up, so one pass has all that any candidate needs:

    hidden = residual after attention + shared + sum over chosen e of weight_e expert_e(x)

of which the last terms are kept for all experts, and a candidate costs one addition and the objective, where the
published search runs the whole model. Ranks share the experts of a layer out, and the candidates with them.

Shape letters:  T tokens of all texts   D model dim   E experts
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint_tools.condense.objectives import Objective, distances_to
from checkpoint_tools.condense.published_json import Shape, Weights, read_weights, write_json, write_weights
from checkpoint_tools.condense.texts import Texts, attended_texts, checked, embedded, read_texts
from checkpoint_tools.condense.unfinished import Unfinished, ranks_of
from checkpoint_tools.forward import beside, expert_output, feed_forward, normed, routed
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Positions
from ep_engine.errors import Fault, UserError
from ep_engine.mesh import World
from ep_engine.progress import bar

Ranking = Literal["frequency", "mass", "weight"]

_TOKENS_AT_ONCE = 1024  # of candidates


@dataclass(frozen=True)
class ExpertOptions:
    """How experts are searched for."""

    experts: int
    objective: Objective = "js"
    max_length: int = 256  # tokens of a text
    max_texts: int | None = None
    timeout_s: float = 300.0
    fit: Path | None = None  # file of least-squares weights to write; None: none are fitted


@dataclass(frozen=True)
class Choice:
    """The experts of a layer, the first chosen first."""

    experts: list[int]
    distances: list[float]  # of the layer with the first 1, 2, ... of them
    fitted: list[float] | None = None  # least-squares weights of all of them together
    fitted_distance: float | None = None  # of the layer with these


@dataclass(frozen=True)
class Candidates:
    """What a layer's candidates are made of; `outputs` has this rank's experts, in the order of `ids`."""

    original_TD: Tensor  # the layer's output, after the final norm if it is the last
    base_TD: Tensor  # with the shared experts alone
    outputs: Tensor  # (experts here, T, D), not weighted
    ids: range
    finish: Callable[[Tensor], Tensor]  # the final norm, or nothing
    where: str = "the layer"


@torch.no_grad()
def choose_experts(
    model: Source,
    texts: Texts,
    weight_LE: Tensor,
    count: int,
    *,
    objective: Objective = "js",
    done: Mapping[int, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    fit: bool = False,
) -> Iterator[tuple[int, Choice]]:
    """The choice of every MoE layer that is not `done`, as each is found.

    Args:
        model: with experts.
        texts: what it is compared on.
        weight_LE: of every expert for every token; NaN: it is no candidate.
        count: experts of a layer.
        objective: see objectives.py; smaller is better, of equals the smallest id.
        done: layers that need no search, among those with experts.
        group: ranks that share the candidates; None: this process alone.
        fit: find least-squares weights of the chosen as well.

    Raises:
        UserError: a layer has fewer candidates than `count`.
        Fault: what the model computes is not a number, or no candidate of a layer has a number.
    """
    for layer, row_E in enumerate(weight_LE):
        if int((~row_E.isnan()).sum()) < count:
            raise UserError(
                f"--experts ({count}) is more than the {int((~row_E.isnan()).sum())} experts of layer {layer} that any "
                "token chose, or has; choose fewer, or count weights on more text"
            )
    config, positions = model.config, Positions(model.config)
    x_TD = embedded(model, texts)
    for layer in range(config.num_layers):
        x_TD = checked(attended_texts(x_TD, texts, model, positions, layer), texts, f"attention of layer {layer}")
        index = config.moe_index(layer)
        if config.moe_of(layer) is None or index in (done or {}):
            x_TD = x_TD + feed_forward(x_TD.unsqueeze(0), config, model.tensors, layer)[0]
            checked(x_TD, texts, f"layer {layer}")
            continue
        with _candidates(x_TD, model, texts, layer, group) as (candidates, x_TD):
            choice = greedy(candidates, texts, weight_LE[index], count, objective=objective, group=group)
            yield index, fitted(candidates, x_TD, texts, choice, objective, group) if fit else choice


def greedy(
    candidates: Candidates,
    texts: Texts,
    weight_E: Tensor,
    count: int,
    *,
    objective: Objective = "js",
    group: dist.ProcessGroup | None = None,
) -> Choice:
    """The experts of one layer; see `choose_experts`."""
    base_TD, chosen, distances = candidates.base_TD.clone(), list[int](), list[float]()
    share_T = texts.shares
    while len(chosen) < count:
        total_E = torch.zeros(len(weight_E), dtype=torch.float64)
        here = [e for e in candidates.ids if e not in chosen and not weight_E[e].isnan()]
        for first in range(0, texts.num_tokens, _TOKENS_AT_ONCE):
            part = slice(first, first + _TOKENS_AT_ONCE)
            distance = distances_to(objective, candidates.original_TD[part])
            for e in here:
                output_TD = candidates.outputs[candidates.ids.index(e), part]
                other_TD = candidates.finish(base_TD[part] + weight_E[e].to(base_TD) * output_TD)
                total_E[e] += distance(other_TD).double() @ share_T[part]
        if group is not None:
            dist.all_reduce(total_E, group=group)  # each was counted by one rank
        excluded = weight_E.isnan() | total_E.isnan()
        excluded[chosen] = True
        if excluded.all():
            raise Fault(
                f"no candidate of {candidates.where} has a distance that is a number; check the model's weights"
            )
        best = int(total_E.masked_fill(excluded, float("inf")).argmin())  # the first of equal ones
        chosen.append(best)
        distances.append(float(total_E[best]))
        is_here = best in candidates.ids
        output_TD = candidates.outputs[candidates.ids.index(best)] if is_here else torch.zeros_like(base_TD)
        base_TD += weight_E[best].to(base_TD) * _summed(output_TD, group)
    return Choice(chosen, distances)


def fitted(
    candidates: Candidates,
    output_TD: Tensor,
    texts: Texts,
    choice: Choice,
    objective: Objective = "js",
    group: dist.ProcessGroup | None = None,
) -> Choice:
    """The choice with the weights that bring the layer's output, before the final norm, nearest in squares.

    Every text weighs the same, as in the objective. Of several solutions that of the smallest norm.
    """
    count, base_TD = len(choice.experts), candidates.base_TD
    ids, silent_TD = candidates.ids, torch.zeros_like(base_TD)
    parts = [
        _summed(candidates.outputs[ids.index(e)] if e in ids else silent_TD, group) for e in choice.experts
    ]  # B of (T, D)
    gram_BB, right_B = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    slices = [slice(first, first + _TOKENS_AT_ONCE) for first in range(0, texts.num_tokens, _TOKENS_AT_ONCE)]
    for part in slices if count else []:
        u_BTD = torch.stack([one[part] for one in parts]).double()
        shared_BTD = u_BTD * texts.shares[part, None]
        gram_BB += torch.einsum("atd,btd->ab", shared_BTD, u_BTD)
        right_B += torch.einsum("atd,td->a", shared_BTD, (output_TD[part] - base_TD[part]).double())
    weight_B = torch.linalg.lstsq(gram_BB, right_B[:, None], driver="gelsd").solution[:, 0] if count else right_B
    total = 0.0
    for part in slices:
        other_TD = base_TD[part] + sum(w * one[part] for w, one in zip(weight_B.tolist(), parts, strict=True))
        distance = distances_to(objective, candidates.original_TD[part])
        total += float(distance(candidates.finish(other_TD)).double() @ texts.shares[part])
    return replace(choice, fitted=weight_B.tolist(), fitted_distance=total)


def ranked_experts(weights: Weights, by: Ranking, count: int) -> list[list[int]]:
    """What popularity alone would choose, for comparison: the most chosen, of the largest sum or the largest mean."""
    values_LE = {"frequency": weights.count_LE, "mass": weights.sum_LE, "weight": weights.means.nan_to_num(nan=-1.0)}
    order_LE = values_LE[by].argsort(dim=1, descending=True, stable=True)
    found: list[list[int]] = order_LE[:, :count].tolist()
    return found


def run_experts(
    folder: Path, corpus: Sequence[Path], weights_file: Path, out: Path, options: ExpertOptions, *, resume: bool = False
) -> tuple[dict[int, Choice], Texts] | None:
    """Write the lists of experts, on all ranks that torchrun has started; None on others than the first.

    Raises:
        UserError: as `choose_experts`, `read_weights` and `read_texts`.
        Fault: as `choose_experts`.
    """
    model, world = open_source(folder), World.from_environment()
    weights = read_weights(weights_file, Shape.of(model.config))
    texts = read_texts(model, corpus, options.max_length, options.max_texts)
    about = {**asdict(options), "fit": options.fit is not None, "texts": [ids.tolist() for ids in texts.ids],
             "weights": [weights.sum_LE.tolist(), weights.count_LE.tolist()]}  # fmt: skip
    unfinished = Unfinished(out, "experts", folder, about, resume=resume)
    found = {int(layer): Choice(**choice) for layer, choice in unfinished.found.items()}
    with (
        ranks_of(world, options.timeout_s) as group,
        bar("layers", len(weights.means), show=world.rank == 0) as advance,
    ):
        advance(len(found))
        search = choose_experts(
            model, texts, weights.means, options.experts, objective=options.objective, done=found, group=group,
            fit=options.fit is not None,
        )  # fmt: skip
        for layer, choice in search:
            found[layer] = choice
            advance(len(found))
            if world.rank == 0:
                unfinished.keep({str(number): asdict(one) for number, one in found.items()})
    if world.rank != 0:
        return None
    if options.fit is not None:
        sum_LE = weights.sum_LE.clone()
        for layer, one in found.items():
            sum_LE[layer, one.experts] = (
                torch.tensor(one.fitted, dtype=torch.float64) * weights.count_LE[layer, one.experts]
            )
        write_weights(options.fit, replace(weights, sum_LE=sum_LE), Shape.of(model.config))
    write_json(out, {str(layer): found[layer].experts for layer in sorted(found)})
    unfinished.remove()
    return found, texts


@contextmanager
def _candidates(
    x_TD: Tensor, model: Source, texts: Texts, layer: int, group: dist.ProcessGroup | None
) -> Iterator[tuple[Candidates, Tensor]]:
    """What candidates need, and the layer's output; `x_TD` is the residual stream after attention."""
    config, tensors = model.config, model.tensors
    moe = config.moe_of(layer)
    assert moe is not None, "the caller has asked"
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    ids = range(rank, moe.num_experts, size)
    h_TD = normed(x_TD, config, tensors, f"layers.{layer}.ffn_norm")
    base_TD = x_TD + beside(h_TD, moe, layer, tensors)
    chosen = routed(h_TD, config, layer, tensors)
    share_TE = torch.zeros(len(h_TD), moe.num_experts).scatter_(1, chosen.ids_TK, chosen.weights_TK)
    with _room((len(ids), *h_TD.shape)) as outputs:
        added_TD = torch.zeros_like(h_TD)
        for place, e in enumerate(ids):
            outputs[place] = expert_output(h_TD, layer, e, tensors)
            here = share_TE[:, e].nonzero()[:, 0]  # what is not a number may be there for others, and adds nothing
            added_TD[here] += share_TE[here, e, None] * outputs[place, here]
        x_TD = checked(base_TD + _summed(added_TD, group), texts, f"layer {layer}")
        last = layer == config.num_layers - 1
        finish = (lambda y_TD: normed(y_TD, config, tensors, "norm")) if last else _as_it_is
        yield Candidates(finish(x_TD), base_TD, outputs, ids, finish, f"layer {layer}"), x_TD


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
    return x


def _as_it_is(x_TD: Tensor) -> Tensor:
    return x_TD


@contextmanager
def _room(shape: Sequence[int]) -> Iterator[Tensor]:
    """A float32 tensor in memory, or in a file if it is more than half of what is free."""
    count = torch.Size(shape).numel()
    if count * 4 <= psutil.virtual_memory().available // 2:
        yield torch.empty(*shape)
        return
    with tempfile.NamedTemporaryFile(prefix="condense-") as file:
        Path(file.name).write_bytes(b"")
        yield torch.from_file(file.name, shared=True, size=count).view(*shape)
