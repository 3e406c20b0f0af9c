"""Router: which experts serve a token, and with what weight.

    tokens -> [router] -> plan -> dispatch -> experts -> combine

A selection rule is a small object with one method, `select(scores_TE) -> ids_TK`; column 0 is the top-1 expert, and of
equal scores the lower id wins. Ids are logical expert ids.

Shape letters:  T tokens of this rank   D model dim   E experts   K top_k
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine import ops
from ep_engine.errors import UserError
from ep_engine.model_config import MoEConfig


class Rule(Protocol):
    """Chooses K distinct experts per token."""

    def select(self, scores_TE: Tensor) -> Tensor:
        """(T, E) float32, any order-preserving function of the logits -> (T, K) int64."""
        ...


class TopK:
    """The K experts with the highest scores."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def select(self, scores_TE: Tensor) -> Tensor:
        """Ids by falling score."""
        return _order(scores_TE)[:, : self.top_k]


class C2R:
    """Collaboration-constrained routing, arXiv:2504.01337: partners of the top-1 expert are its close collaborators.

    Args:
        top_k: K.
        lists: (E, n) rows of expert ids, closest collaborator of expert i first in row i; i itself, if there, last.
        top_t: T, how many of a row are candidates, in K-1..E-1; None: all but i itself.

    Raises:
        UserError: T outside K-1..E-1, or longer than the lists; a row that names an expert twice, one that is not
            there, or the row's own among the first T.
    """

    def __init__(self, top_k: int, lists: Sequence[Sequence[int]] | Tensor, top_t: int | None = None) -> None:
        # On the CPU also inside a `torch.device("meta")` block: tables are values, not weights.
        table_EN = torch.as_tensor(lists, dtype=torch.int64, device="cpu")
        num_experts, length = table_EN.shape
        self.top_k, self.num_experts = top_k, num_experts
        self.top_t = min(length, num_experts - 1) if top_t is None else top_t
        if not top_k - 1 <= self.top_t <= min(num_experts - 1, length):
            raise UserError(
                f"routing.top_t ({self.top_t}) must be in k-1..E-1 = {top_k - 1}..{num_experts - 1} and lists of "
                f"{length} must be as long; choose it there"
            )
        _check_lists(table_EN, self.top_t)
        self._lists_EN = table_EN
        allowed_EE = torch.zeros(num_experts, num_experts, dtype=torch.bool, device="cpu")
        self._allowed_EE = allowed_EE.scatter_(1, table_EN[:, : self.top_t], True)

    def select(self, scores_TE: Tensor) -> Tensor:
        """The top-1 expert, then the best K-1 of its first T collaborators."""
        order_TE = _order(scores_TE)
        self._allowed_EE = self._allowed_EE.to(scores_TE.device)  # once: the tables follow the model to its device
        return _best(scores_TE, order_TE, self._allowed_EE[order_TE[:, 0]], self.top_k)


class C2RGrouped(C2R):
    """C2R on at most M devices per token, which is guaranteed.

    The devices are the first M distinct ones met in score order, the top-1 expert's among them. Candidates are the
    first T collaborators that live there; if fewer than K-1 remain, the list is followed further, inside them.

    Args:
        top_k: K.
        lists: (E, E) or (E, E - 1), as of C2R: a row names all other experts.
        device_of_expert: [E], ids of any kind.
        max_devices: M.
        top_t: T, as of C2R.

    Raises:
        UserError: M devices may hold fewer than K experts, or lists do not name all other experts.
    """

    def __init__(
        self,
        top_k: int,
        lists: Sequence[Sequence[int]] | Tensor,
        device_of_expert: Sequence[int] | Tensor,
        max_devices: int = 1,
        top_t: int | None = None,
    ) -> None:
        super().__init__(top_k, lists, top_t)
        device_E = torch.as_tensor(device_of_expert, device="cpu").unique(return_inverse=True)[1]
        if self._lists_EN.shape[1] < self.num_experts - 1 or len(device_E) != self.num_experts:
            raise UserError(
                f"c2r_grouped needs lists of {self.num_experts - 1} and devices of {self.num_experts} experts, got "
                f"{self._lists_EN.shape[1]} and {len(device_E)}; make both from a profile of this model"
            )
        smallest = device_E.bincount().sort().values[:max_devices].sum().item()
        if smallest < top_k:
            raise UserError(
                f"routing.max_devices ({max_devices}) devices may hold only {smallest} experts, fewer than top_k "
                f"({top_k}); allow more devices per token"
            )
        self.max_devices = max_devices
        self._device_E = device_E
        self._lists_EN = self._lists_EN[:, : self.num_experts - 1]

    def select(self, scores_TE: Tensor) -> Tensor:
        """The top-1 expert, then the best K-1 candidates on the token's devices."""
        self._lists_EN = self._lists_EN.to(scores_TE.device)
        self._device_E = self._device_E.to(scores_TE.device)
        order_TE = _order(scores_TE)
        row_TN = self._lists_EN[order_TE[:, 0]]
        inside_TN = self._on_first_devices(order_TE).gather(1, row_TN)
        near_N = torch.arange(row_TN.shape[1], device=row_TN.device) < self.top_t
        open_TN = inside_TN & (near_N | (inside_TN.cumsum(dim=1) <= self.top_k - 1))
        allowed_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, row_TN, open_TN)
        return _best(scores_TE, order_TE, allowed_TE, self.top_k)

    def _on_first_devices(self, order_TE: Tensor) -> Tensor:
        """(T, E) bool: the expert lives on one of the first M distinct devices in score order."""
        num_tokens, num_experts = order_TE.shape
        place_E = torch.arange(num_experts, device=order_TE.device).expand_as(order_TE)
        device_TE = self._device_E[order_TE]
        first_met_TD = order_TE.new_full((num_tokens, num_experts), num_experts)
        first_met_TD = first_met_TD.scatter_reduce(1, device_TE, place_E, reduce="amin")
        last_T1 = first_met_TD.sort(dim=1).values[:, self.max_devices - 1 : self.max_devices]
        return first_met_TD[:, self._device_E] <= last_T1


def _check_lists(table_EN: Tensor, top_t: int) -> None:
    num_experts = len(table_EN)
    for expert, row in enumerate(table_EN.tolist()):
        if len(set(row)) < len(row) or not set(row) <= set(range(num_experts)) or expert in row[:top_t]:
            raise UserError(
                f"collaboration list of expert {expert} must name others of the {num_experts} experts, each once, got "
                f"{row[:8]}{'...' if len(row) > 8 else ''}; write it again with `ep-engine profile`"
            )


def _order(scores_TE: Tensor) -> Tensor:
    return scores_TE.sort(dim=1, descending=True, stable=True).indices


def _best(scores_TE: Tensor, order_TE: Tensor, allowed_TE: Tensor, top_k: int) -> Tensor:
    """The top-1 expert, then the best K-1 of the allowed ones."""
    allowed_scores_TE = scores_TE.masked_fill(~allowed_TE, -torch.inf)
    return torch.cat((order_TE[:, :1], _order(allowed_scores_TE)[:, : top_k - 1]), dim=1)


def make_rule(moe: MoEConfig, layer: int) -> Rule:
    """The selection rule of one layer of a model."""
    routing = moe.routing
    if routing.rule == "topk":
        return TopK(moe.top_k)
    assert routing.lists is not None, "MoEConfig checks that the tables are there"
    if routing.rule == "c2r":
        return C2R(moe.top_k, routing.lists[layer], routing.top_t)
    assert routing.device_of_expert is not None, "MoEConfig checks that the tables are there"
    assert routing.max_devices is not None, "MoEConfig checks that the tables are there"
    devices = routing.device_of_expert[layer]
    return C2RGrouped(moe.top_k, routing.lists[layer], devices, routing.max_devices, routing.top_t)


def linear_by_row(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x @ w.T in float32, (T, E). On CPU a token's logits and gradients do not depend on which tokens it is among."""
    if x_TD.is_cuda:
        return F.linear(x_TD, w_ED)
    logits_TE: Tensor = _LinearByRow.apply(x_TD, w_ED)  # type: ignore[no-untyped-call]
    return logits_TE


class _LinearByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        return ops.linear_rows(x_TD, w_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, w_ED = ctx.saved_tensors
        return ops.linear_rows(grads[0], w_ED.t()), grads[0].t() @ x_TD


class Routing(NamedTuple):
    """The router's answer for the tokens of one rank."""

    ids_TK: Tensor  # int64, distinct in a row
    weights_TK: Tensor  # float32
    logits_TE: Tensor  # float32


class Router(nn.Module):
    """Logits by a linear or a two-layer gate in float32; combine weights by softmax over the K chosen, times a scale.

    The gates of LLaMA-MoE v1: `linear` is w_in (E, D); `mlp` is w_out (E, E) tanh(w_in x).
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.w_out = nn.Parameter(torch.empty(moe.num_experts, moe.num_experts)) if moe.gate == "mlp" else None
        self.score_scale = moe.score_scale
        self.rule = make_rule(moe, layer)

    def forward(self, x_TD: Tensor) -> Routing:
        """(T, D) of any dtype -> Routing; T may be 0."""
        logits_TE = linear_by_row(x_TD.float(), self.w_in.float())
        if self.w_out is not None:
            logits_TE = linear_by_row(torch.tanh(logits_TE), self.w_out.float())
        # The logits themselves are compared: softmax keeps their order but may round two of them together.
        ids_TK = self.rule.select(logits_TE.detach())
        weights_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=1) * self.score_scale
        return Routing(ids_TK, weights_TK, logits_TE)
