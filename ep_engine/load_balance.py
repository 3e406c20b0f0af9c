"""Load balance: what the router did, and the loss that keeps experts equally busy (arXiv:2101.03961 eq. 4-6)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ep_engine.router import Routing


class RouterStatistics(NamedTuple):
    """Sums over the tokens of this rank, for one layer."""

    load_E: Tensor  # (E,) float32: tokens that chose each expert, under the rule in force
    probability_E: Tensor  # (E,) float32: softmax over all experts, with gradient
    ids_TK: Tensor  # (T, K) int64: the choices themselves
    logits_TE: Tensor  # (T, E) float32, without gradient


def router_statistics(routing: Routing) -> RouterStatistics:
    """Sum the choices and the probabilities of one layer."""
    ids_TK, _, logits_TE = routing
    load_E = torch.zeros(logits_TE.shape[1], device=logits_TE.device)
    load_E = load_E.scatter_add(0, ids_TK.reshape(-1), torch.ones(ids_TK.numel(), device=ids_TK.device))
    return RouterStatistics(load_E, torch.softmax(logits_TE, dim=1).sum(dim=0), ids_TK, logits_TE.detach())


def with_plain_load(router: RouterStatistics) -> RouterStatistics:
    """The same with the load that plain top-k on the same logits would give."""
    top_k, num_experts = router.ids_TK.shape[1], router.logits_TE.shape[1]
    plain_TK = router.logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return router._replace(load_E=torch.bincount(plain_TK.reshape(-1), minlength=num_experts).to(router.load_E))


def load_balance_loss(
    layers: Sequence[RouterStatistics], num_tokens: int, group: dist.ProcessGroup | None, num_layers: int | None = None
) -> Tensor:
    """This rank's share of mean over layers of E * sum over e of f_e * P_e; the shares of all ranks add up to it.

    f_e is the share of all routed copies that went to expert e, P_e its mean probability, both over all tokens of all
    ranks: the loss does not depend on how tokens are spread over ranks. It is 1 for perfect balance. f comes from the
    choices of the rule in force, and has no gradient.

    Args:
        layers: statistics of every MoE layer that is here, in order.
        num_tokens: tokens of all ranks.
        group: the ranks that share the batch, with the same layers; None: only this one.
        num_layers: MoE layers of the model; None: those that are here.
    """
    load_LE = _stacked([layer.load_E for layer in layers])
    if group is not None:
        dist.all_reduce(load_LE, group=group)
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    probability_LE = _stacked([layer.probability_E for layer in layers]) / num_tokens
    experts_L = torch.tensor([len(layer.load_E) for layer in layers], device=load_LE.device)
    return (experts_L * (share_LE * probability_LE).sum(dim=1)).sum() / (num_layers or len(layers))


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """(L, E) of rows that may differ in length, which are filled up with zeros."""
    most = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, most - len(row))) for row in rows])


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
