"""Losses on what a layer's router does: from sums over tokens, so that ranks and parts of a batch can share them.

A loss has two halves. `sums` adds something up over the tokens of a rank, with gradient; it is computed inside the
layer. `value` makes a number of the sums over all tokens, wherever they were; watch.py brings the two together.

Letters:  T tokens of a rank   N tokens in all   E experts   K top_k   B rows
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_engine.config import BalanceSection
from ep_engine.router import Routing

_CLOSED = -1e9  # a logit that no noise reaches; at infinity gradients would be no numbers


class Seen(NamedTuple):
    """What the losses see of a rank's tokens in one layer."""

    routing: Routing
    probability_TE: Tensor  # float32, with gradient: of all experts, by the model's kind of score
    counts_T: Tensor | None  # bool: tokens that are no padding; None: all
    num_rows: int  # T / B positions each

    def over_tokens(self, x: Tensor) -> Tensor:
        """Sum of (T, n) over the tokens that count."""
        if self.counts_T is not None:
            x = torch.where(self.counts_T[:, None], x, 0.0)
        return x.sum(dim=0)

    def load(self, ids_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        """Tokens that chose each expert, float32; of choices that are kept."""
        ones_TK = torch.ones(ids_TK.shape, device=ids_TK.device) if kept_TK is None else kept_TK.float()
        if self.counts_T is not None:
            ones_TK = ones_TK * self.counts_T[:, None]
        zeros_E = ones_TK.new_zeros(self.probability_TE.shape[1])
        return zeros_E.scatter_add(0, ids_TK.reshape(-1), ones_TK.reshape(-1))  # bincount would wait for a GPU


@dataclass(frozen=True)
class BalanceLoss:
    """One kind of loss.

    Attributes:
        sums: (n,) float32 over tokens; or (B, n), where every row of the batch has a loss of its own.
        value: of those sums over all tokens, and N.
        of_rows: the latter.
    """

    sums: Callable[[Seen], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    of_rows: bool = False


def losses_of(balance: BalanceSection) -> dict[str, tuple[float, BalanceLoss]]:
    """The losses that a run asks for, by name, with their coefficients."""
    return {name: (value, kind(balance)) for name, kind in _KINDS.items() if (value := getattr(balance, name)) > 0}


def _switch(balance: BalanceSection) -> BalanceLoss:
    """E * sum over e of f_e P_e, arXiv:2101.03961 eq. 4-6: 1 for perfect balance.

    f_e is the share of all choices that went to e, without gradient, P_e its mean probability.
    """

    def sums(seen: Seen) -> Tensor:
        ids_TK = seen.routing.ids_TK
        if balance.switch_of == "plain":
            order = seen.routing.logits_TE.detach().sort(dim=1, descending=True, stable=True)
            ids_TK = order.indices[:, : ids_TK.shape[1]]
        return torch.cat((seen.load(ids_TK), seen.over_tokens(seen.probability_TE)))

    return BalanceLoss(sums, _switch_value)


def _switch_value(sums: Tensor, tokens: Tensor) -> Tensor:
    load_E, probability_E = sums.chunk(2)
    return len(load_E) * (load_E / load_E.sum() * probability_E).sum() / tokens


def _importance(balance: BalanceSection) -> BalanceLoss:
    """Squared variation of the sums of combine weights, arXiv:1701.06538 eq. 6-7."""

    def sums(seen: Seen) -> Tensor:
        weight_TE = torch.zeros_like(seen.probability_TE).scatter(1, seen.routing.ids_TK, seen.routing.weights_TK)
        return seen.over_tokens(weight_TE)

    return BalanceLoss(sums, lambda sums, _: squared_variation(sums))


def _load(balance: BalanceSection) -> BalanceLoss:
    """Squared variation of the load, arXiv:1701.06538 appendix A.

    With noise an expert's load is the sum over tokens of its probability to be among the K best if its own noise were
    drawn again, which has a gradient; without noise choices are counted, which have none. Under C2R the K best are
    those of the best expert and its close collaborators; others have the probability 0.
    """

    def sums(seen: Seen) -> Tensor:
        drawn = seen.routing.noise
        if drawn is None or seen.routing.ids_TK.shape[1] == seen.probability_TE.shape[1]:
            return seen.load(seen.routing.ids_TK)
        noisy_TE, open_TE = seen.routing.logits_TE, drawn.open_TE
        allowed_TE = noisy_TE if open_TE is None else noisy_TE.masked_fill(~open_TE, _CLOSED)
        best = allowed_TE.topk(seen.routing.ids_TK.shape[1] + 1, dim=1).values
        to_enter, to_stay = best[:, -2:-1], best[:, -1:]
        # The published code of LLaMA-MoE asks the noise alone whether an expert is in, and with C2R of all experts.
        tested = noisy_TE - drawn.clean_TE if balance.reference_compat else noisy_TE
        bar_TE = torch.where(tested > to_stay, to_stay, to_enter)
        chance_TE = 0.5 * (1 + torch.erf((drawn.clean_TE - bar_TE) / drawn.deviation_TE / math.sqrt(2)))
        if open_TE is not None and not balance.reference_compat:
            chance_TE = torch.where(open_TE, chance_TE, 0.0)
        return seen.over_tokens(chance_TE)

    return BalanceLoss(sums, lambda sums, _: squared_variation(sums))


def squared_variation(v: Tensor) -> Tensor:
    """Variance (of a sample) over the squared mean; 0 for a single number."""
    if len(v) == 1:
        return v.new_zeros(())
    return v.var() / (v.mean() ** 2 + 1e-10)


def _mutual_information(balance: BalanceSection) -> BalanceLoss:
    """Minus the information between tokens and experts, H(e|x) - H(e), arXiv:2212.08066: from -ln E to 0, in nats."""

    def sums(seen: Seen) -> Tensor:
        log_TE = seen.routing.logits_TE.log_softmax(dim=1)
        p_TE = log_TE.exp()
        entropy = -seen.over_tokens((p_TE * log_TE).sum(dim=1, keepdim=True))
        return torch.cat((seen.over_tokens(p_TE), entropy))

    def value(sums: Tensor, tokens: Tensor) -> Tensor:
        mean_E = sums[:-1] / tokens
        return sums[-1] / tokens + (mean_E * torch.log(mean_E + 1e-8)).sum()

    return BalanceLoss(sums, value)


def _z(balance: BalanceSection) -> BalanceLoss:
    """Mean over tokens of the squared logarithm of the sum of exponentials, arXiv:2202.08906 eq. 5."""

    def sums(seen: Seen) -> Tensor:
        return seen.over_tokens(seen.routing.logits_TE.logsumexp(dim=1, keepdim=True).square())

    return BalanceLoss(sums, lambda sums, tokens: sums[0] / tokens)


def _sequence(balance: BalanceSection) -> BalanceLoss:
    """Switch's loss of every row by itself, arXiv:2412.19437 eq. 17-20, as the mean over rows."""

    def sums(seen: Seen) -> Tensor:
        chosen_TE = torch.zeros_like(seen.probability_TE).scatter(1, seen.routing.ids_TK, 1.0)
        both = torch.cat((chosen_TE, seen.probability_TE, torch.ones_like(chosen_TE[:, :1])), dim=1)
        if seen.counts_T is not None:
            both = both * seen.counts_T[:, None]
        of_rows: Tensor = both.unflatten(0, (seen.num_rows, -1)).sum(dim=1)
        return of_rows

    def value(sums_BN: Tensor, rows: Tensor) -> Tensor:
        tokens_B = sums_BN[:, -1].clamp(min=1)
        chosen_BE, probability_BE = sums_BN[:, :-1].chunk(2, dim=1)
        share_BE = chosen_BE / chosen_BE.sum(dim=1, keepdim=True).clamp(min=1)
        of_row = chosen_BE.shape[1] * (share_BE * probability_BE).sum(dim=1) / tokens_B
        return of_row.sum() / rows

    return BalanceLoss(sums, value, of_rows=True)


_KINDS: dict[str, Callable[[BalanceSection], BalanceLoss]] = {
    "switch": _switch,
    "importance": _importance,
    "load": _load,
    "sequence": _sequence,
    "mutual_information": _mutual_information,
    "z": _z,
}


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    """Of all experts: a softmax; of sigmoid scores their shares, arXiv:2412.19437 eq. 19."""
    if score == "sigmoid":
        return F.normalize(logits_TE.sigmoid(), p=1.0, dim=1)
    return logits_TE.softmax(dim=1)
