"""Router: which experts serve a token, and with what weight.

    tokens -> [router] -> plan -> dispatch -> experts -> combine

Shape letters:  T tokens of this rank   D model dim   E experts   K top_k
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine import ops
from ep_engine.capacity import Capacity
from ep_engine.model_config import MoEConfig
from ep_engine.noise import gumbel, normal
from ep_engine.selection import make_rule
from ep_engine.weight_grads import Handover, tie

_LEAST_DEVIATION = 0.01


class Routing(NamedTuple):
    """The router's answer for the tokens of one rank."""

    ids_TK: Tensor  # int64, distinct in a row
    weights_TK: Tensor  # float32, 0 for a choice that is dropped
    logits_TE: Tensor  # float32, with the noise that was added
    noise: "Noise | None" = None  # None: nothing was
    kept_TK: Tensor | None = None  # bool: choices that are served; None: all

    @property
    def served(self) -> Tensor:
        """The choices that are served, -1 for others."""
        return self.ids_TK if self.kept_TK is None else self.ids_TK.masked_fill(~self.kept_TK, -1)


class Choice(NamedTuple):
    """What a router has chosen, for a layer that is computed twice."""

    ids_TK: Tensor
    kept_TK: Tensor | None


class Noise(NamedTuple):
    """Of a noisy gate, arXiv:1701.06538 eq. 4."""

    clean_TE: Tensor  # float32, the logits without it
    deviation_TE: Tensor  # float32, its standard deviation
    open_TE: Tensor | None = None  # bool, experts that the rule allows beside the best one; None: all


class Router(nn.Module):
    """Logits by a gate in float32, and combine weights as MoEConfig's `score` says; `layer` is among the MoE layers.

    Gates of LLaMA-MoE v1: `linear` is w_in x, w_in (E, D); `mlp` is w_out tanh(w_in x), w_out (E, E).
    Gates of MoLlama: `mlp_gelu` is w_out gelu(w_in x + b_in), w_in (R, D), w_out (E, R); `cosine` is exp(temperature)
    times the cosine of w_in x and of every row of w_out (arXiv:2204.09179 eq. 3, there called X-MoE).
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        num_experts, inside = moe.num_experts, moe.gate_hidden_size or moe.num_experts
        self.w_in = nn.Parameter(torch.empty(inside, hidden_size))
        self.w_out = None if moe.gate == "linear" else nn.Parameter(torch.empty(num_experts, inside))
        self.b_in = nn.Parameter(torch.empty(inside)) if moe.gate == "mlp_gelu" else None
        self.temperature = nn.Parameter(torch.empty(1)) if moe.gate == "cosine" else None
        # Carried from checkpoint to checkpoint, unless a run adds noise.
        self.w_noise = (
            nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False) if moe.gate_noise else None
        )
        # Moved by the load of experts, not by gradients (arXiv:2408.15664).
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False) if moe.selection_bias else None
        # In the place of a fixed factor, from which it starts.
        self.scale = nn.Parameter(torch.empty(1)) if moe.learned_scale else None
        self.layer = layer
        self.noise_seed: int | None = None  # None: no noise
        self.gumbel_seed: int | None = None
        self.capacity: Capacity | None = None
        renormalise = moe.renormalise or moe.routing.weights == "selected"
        self.weighing = moe.score, renormalise, 1.0 if moe.learned_scale else moe.scale_of(layer)
        self.match_plain_mass = moe.routing.weights == "match_plain_mass"
        self.rule = make_rule(moe, layer)

    def add_noise(self, seed: int) -> None:
        """From now on tokens that are numbered get noise, whose matrix is trained."""
        assert self.w_noise is not None, "asked for by whoever has read the model's configuration"
        self.w_noise.requires_grad_(True)
        self.noise_seed = seed

    def forward(self, x_TD: Tensor, numbers_T: Tensor | None = None, before: Choice | None = None) -> Routing:
        """(T, D) of any dtype -> Routing; T may be 0.

        Args:
            x_TD: tokens.
            numbers_T: int64, each token's number in the run, -1 of padding; while training alone. A token's noise
                depends on it, and what has a capacity is then full at some point.
            before: choices made before for the same tokens, to be weighed again.
        """
        logits_TE, noise = self.logits(x_TD), None
        if self.noise_seed is not None and numbers_T is not None:
            logits_TE, noise = self._with_noise(logits_TE, x_TD, numbers_T)
        if self.gumbel_seed is not None and numbers_T is not None:
            logits_TE = logits_TE + gumbel(numbers_T, logits_TE.shape[1], self.gumbel_seed, self.layer)
        score, renormalise, scale = self.weighing
        how = self.rule.on(logits_TE.device)._replace(score=score, renormalise=renormalise, scale=scale)
        if self.bias is not None:
            how = how._replace(bias_E=self.bias.float())
        ids_TK = None if before is None else before.ids_TK
        if ids_TK is not None:
            how = how._replace(rule="given")
        ids_TK, weights_TK = _Choose.apply(logits_TE, how, ids_TK)  # type: ignore[no-untyped-call]
        if noise is not None:
            noise = noise._replace(open_TE=self.rule.may_follow(ids_TK[:, 0]))
        if self.match_plain_mass:
            _, plain_TK = _Choose.apply(logits_TE, how._replace(rule="topk"), None)  # type: ignore[no-untyped-call]
            weights_TK = weights_TK * (_sum_of_row(plain_TK) / _sum_of_row(weights_TK))
        if self.scale is not None:
            weights_TK = weights_TK * self.scale.float()
        kept_TK = None if before is None else before.kept_TK
        if self.capacity is not None and numbers_T is not None and before is None:
            kept_TK = self.capacity(ids_TK, logits_TE.shape[1], numbers_T >= 0)
        if kept_TK is not None:
            weights_TK = torch.where(kept_TK, weights_TK, 0.0)
        return Routing(ids_TK, weights_TK, logits_TE, noise, kept_TK)

    def _with_noise(self, logits_TE: Tensor, x_TD: Tensor, numbers_T: Tensor) -> tuple[Tensor, Noise]:
        """arXiv:1701.06538 eq. 4, with the 0.01 of LLaMA-MoE's code added to the deviation."""
        assert self.w_noise is not None, "`add_noise` has asked"
        assert self.noise_seed is not None, "the caller has asked"
        deviation_TE = F.softplus(linear_by_row(x_TD.float(), self.w_noise.float())) + _LEAST_DEVIATION
        drawn_TE = normal(numbers_T, logits_TE.shape[1], self.noise_seed, self.layer)
        return logits_TE + deviation_TE * drawn_TE, Noise(logits_TE, deviation_TE)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) of any dtype -> (T, E) float32."""
        inside = linear_by_row(x_TD.float(), self.w_in.float())
        if self.w_out is None:
            return inside
        w_out = self.w_out.float()
        if self.temperature is not None:
            cosine_TE = linear_by_row(F.normalize(inside, dim=1), F.normalize(w_out, dim=1))
            return self.temperature.float().exp() * cosine_TE
        inside = torch.tanh(inside) if self.b_in is None else F.gelu(inside + self.b_in.float())
        return linear_by_row(inside, w_out)


def _sum_of_row(weights_TK: Tensor) -> Tensor:
    """(T, 1), column after column: the bits of a token's sum do not depend on which tokens it is among."""
    total_T1 = weights_TK[:, :1]
    for column in range(1, weights_TK.shape[1]):
        total_T1 = total_T1 + weights_TK[:, column : column + 1]
    return total_T1


def linear_by_row(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x @ w.T in float32, (T, E). On CPU a token's logits and gradients do not depend on which tokens it is among."""
    if x_TD.is_cuda:
        return F.linear(x_TD, w_ED)
    handover = Handover()
    x_TD = tie(x_TD, handover, w_ED)
    logits_TE: Tensor = _LinearByRow.apply(x_TD, w_ED.detach(), handover)  # type: ignore[no-untyped-call]
    return logits_TE


class _LinearByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor, handover: Handover) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        ctx.handover = handover
        return ops.linear_rows(x_TD, w_ED.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x_TD, w_ED = ctx.saved_tensors
        ctx.handover.weight_grads = lambda: (grads[0].t() @ x_TD,)
        return ops.linear_rows(grads[0], w_ED), None, None


class _Choose(torch.autograd.Function):
    """Logits -> ids, weights; the weights have gradients, the choice has none."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, how: ops.Selection, ids_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = ops.choose_experts(logits_TE, how, None if ids_TK is None else ids_TK.clone())
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.how = how
        ctx.mark_non_differentiable(ids_TK)
        return ids_TK, weights_TK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TE, ids_TK = ctx.saved_tensors
        return ops.choose_experts_backward(grads[1], logits_TE, ids_TK, ctx.how), None, None
