"""Load balance: what a layer's router did with the tokens of this rank, and how a loss on it joins the model's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_engine.balance_losses import BalanceLoss, Seen, probabilities
from ep_engine.router import Routing


class RouterStatistics(NamedTuple):
    """Sums over the tokens of this rank that are no padding, for one layer."""

    load_E: Tensor  # (E,) float32: tokens that chose each expert, under the rule in force
    probability_E: Tensor  # (E,) float32, without gradient: of all experts
    ids_TK: Tensor  # (T, K) int64: the choices themselves, -1 of padding
    logits_TE: Tensor  # (T, E) float32, without gradient
    num_tokens: Tensor  # int64
    entropy: Tensor  # float32: sum over tokens of the entropy of their probabilities, in nats
    dropped_E: Tensor  # (E,) float32: choices of each expert that it did not serve
    sums: tuple[Tensor, ...] = ()  # of the losses that were asked for, with gradient


def router_statistics(
    routing: Routing,
    score: str = "softmax",
    losses: Sequence[BalanceLoss] = (),
    counts_T: Tensor | None = None,
    num_rows: int = 1,
) -> RouterStatistics:
    """Sum what one layer's router did.

    Args:
        routing: its answer.
        score: the model's kind.
        losses: whose sums to take.
        counts_T: bool, tokens that are no padding; None: all.
        num_rows: of the batch.
    """
    seen = Seen(routing, probabilities(routing.logits_TE, score), counts_T, num_rows)
    ids_TK, load_E = routing.ids_TK, seen.load(routing.ids_TK)
    served_E = load_E if routing.kept_TK is None else seen.load(ids_TK, routing.kept_TK)
    if counts_T is not None:
        ids_TK = ids_TK.masked_fill(~counts_T[:, None], -1)
    return RouterStatistics(
        load_E,
        seen.over_tokens(seen.probability_TE.detach()),
        ids_TK,
        routing.logits_TE.detach(),
        (ids_TK[:, 0] >= 0).sum(),
        seen.over_tokens(torch.special.entr(seen.probability_TE.detach()).sum(dim=1, keepdim=True))[0],
        load_E - served_E,
        tuple(loss.sums(seen) for loss in losses),
    )


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, whose backward is also that of `loss`, a scalar: the loss of a stage that is not the last."""
    y: Tensor = _WithLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return y


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()  # a pipeline detaches what a stage returns, which a view would refuse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


def standing_for(local: Tensor, total: Tensor) -> Tensor:
    """`total`, whose gradient is that of `local`: what a rank adds up, in the place of what all of them do.

    Each adds the gradient of a loss on the total to its own part, and the parts' gradients are those of the loss.
    """
    y: Tensor = _StandingFor.apply(local, total)  # type: ignore[no-untyped-call]
    return y


class _StandingFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
