"""Routing traces: which experts the tokens of a step went to, read from a file or drawn.

A trace is an .npz with `ids` (L, T, K) integers: the experts of every token in every MoE layer. Tokens stand in the
order of the batch: part by part, row by row, position by position. T is that of one step at least; what goes beyond is
not read. With `scores` (L, T, E) beside them, the routers' logits in 16 bits, other rules can be tried on it.

Shape letters:  L MoE layers   T tokens of a step, on all ranks   K top_k   E experts
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep_engine.c2r.collaboration import UNREADABLE, read_profile, why_unreadable
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, in_words
from ep_engine.output import whole_file
from ep_engine.selection import make_rule

DRAWN = 1 << 16  # tokens; a step of more repeats them, which changes no share


def save_trace(path: Path, ids_LTK: NDArray[np.int16], scores_LTE: NDArray[np.float16] | None = None) -> None:
    """Write a trace of the experts of tokens that follow each other, for every layer."""
    arrays: dict[str, Any] = {"ids": ids_LTK} if scores_LTE is None else {"ids": ids_LTK, "scores": scores_LTE}
    with whole_file(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_trace(path: Path, model: ModelConfig, num_tokens: int, seed: int) -> tuple[Tensor, str]:
    """The experts of one step, (L, T, K) int16, from a trace, or drawn with the loads of a profile; and what they are.

    Raises:
        UserError: the file is neither, or not of this model, or has fewer tokens than a step.
    """
    moe = model.moe
    assert moe is not None, "the caller has asked"
    experts_of_layer = model.experts_of_layer()
    ids_LTK = _array(path)
    if ids_LTK is not None:
        ids_LTK = _checked(ids_LTK, path, experts_of_layer, moe.top_k)
        if ids_LTK.shape[1] < num_tokens:
            raise UserError(
                f"trace {path} has {ids_LTK.shape[1]} tokens, a step of the run has {num_tokens} (data.batch_size "
                "times data.sequence_length); trace more, or plan a smaller batch"
            )
        return ids_LTK[:, :num_tokens], f"trace {path}"
    profile = read_profile(path)
    if profile.experts_of_layer != experts_of_layer:
        raise UserError(
            f"profile {path} has {in_words(profile.experts_of_layer)}, the model {in_words(experts_of_layer)}; profile "
            "this model"
        )
    what = f"drawn with the loads of profile {path}, seed {seed}"
    return draw_routing(model, num_tokens, seed, torch.from_numpy(profile.load)), what


def draw_routing(model: ModelConfig, num_tokens: int, seed: int, load_LE: Tensor | None = None) -> Tensor:
    """Random experts under the model's rule, (L, T, K) int16.

    Scores are those of a draw without replacement in proportion to the loads (arXiv:1903.06059), which the rule then
    chooses from; without loads all experts are alike.
    """
    moe = model.moe
    assert moe is not None, "the caller has asked"
    generator = torch.Generator().manual_seed(seed)
    count, experts_of_layer = min(num_tokens, DRAWN), model.experts_of_layer()
    ids_LTK = torch.empty(len(experts_of_layer), count, moe.top_k, dtype=torch.int16)
    for layer, experts in enumerate(experts_of_layer):
        bias_E = torch.zeros(experts) if load_LE is None else load_LE[layer, :experts].clamp(min=0.5).log().float()
        gumbel_TE = -torch.empty(count, experts).exponential_(generator=generator).log()
        ids_LTK[layer] = make_rule(moe.in_layer(layer), layer).select(bias_E + gumbel_TE)
    return ids_LTK if count == num_tokens else ids_LTK.repeat(1, -(-num_tokens // count), 1)[:, :num_tokens]


def read_ids(path: Path, experts_of_layer: Sequence[int], top_k: int) -> Tensor:
    """All experts of a trace, (L, T, K) int16.

    Raises:
        UserError: it is unreadable, has no `ids`, or is not of such a model.
    """
    ids = _array(path)
    if ids is None:
        raise UserError(f"trace {path} has no array `ids` (L, T, K); make one with `ep-engine profile --trace`")
    return _checked(ids, path, experts_of_layer, top_k)


def choose_again(path: Path, ids_LTK: Tensor, model: ModelConfig) -> Tensor:
    """The experts that the model's rule chooses by a trace's scores, (L, T, K) int16.

    Raises:
        UserError: the trace has no scores, or not those of its tokens.
    """
    moe = model.moe
    assert moe is not None, "a trace is of a MoE model"
    scores_LTE = _array(path, "scores")
    if scores_LTE is None:
        raise UserError(
            f"trace {path} says which experts were chosen, but not what rule {moe.routing.rule} would choose; make it "
            "with `ep-engine profile --trace --scores`"
        )
    shape = (*ids_LTK.shape[:2], moe.num_experts)
    finite = scores_LTE.is_floating_point() and scores_LTE.shape == shape
    if not finite or not all(scores_LTE[n, :, :e].isfinite().all() for n, e in enumerate(model.experts_of_layer())):
        raise UserError(
            f"trace {path} must have finite `scores` of {shape}, got {tuple(scores_LTE.shape)} of {scores_LTE.dtype}; "
            "trace this model"
        )
    chosen = [
        make_rule(moe.in_layer(n), n).select(scores_LTE[n, :, :e].float())
        for n, e in enumerate(model.experts_of_layer())
    ]
    return torch.stack(chosen).to(torch.int16)


def _array(path: Path, name: str = "ids") -> Tensor | None:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = file.get(name)
    except UNREADABLE as error:
        raise UserError(
            f"trace {path} cannot be read ({why_unreadable(error)}); give an .npz with `ids` (L, T, K)"
        ) from None
    return None if found is None else torch.from_numpy(np.ascontiguousarray(found))


def _checked(ids_LTK: Tensor, path: Path, experts_of_layer: Sequence[int], top_k: int) -> Tensor:
    num_layers = len(experts_of_layer)
    whole = not (ids_LTK.is_floating_point() or ids_LTK.is_complex() or ids_LTK.dtype == torch.bool)
    if not whole or ids_LTK.ndim != 3 or (len(ids_LTK), ids_LTK.shape[2]) != (num_layers, top_k):
        raise UserError(
            f"trace {path} must have integers `ids` of ({num_layers} layers, tokens, {top_k} experts), got "
            f"{tuple(ids_LTK.shape)} of {ids_LTK.dtype}; trace this model"
        )
    ids_LTK = ids_LTK.long()
    experts_L = torch.tensor(experts_of_layer)
    outside = (ids_LTK < 0) | (ids_LTK >= experts_L[:, None, None])
    if outside.any():
        layer = int(outside.nonzero()[0, 0])
        raise UserError(
            f"trace {path} names expert {int(ids_LTK[outside][0])}, the model has {experts_of_layer[layer]}; trace this"
            " model"
        )
    if (ids_LTK.sort(dim=2).values.diff(dim=2) == 0).any():
        raise UserError(f"trace {path} names an expert twice for one token; write its experts once each")
    return ids_LTK.to(torch.int16)
