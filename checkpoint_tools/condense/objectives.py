"""How far a condensed model's hidden states are from the original ones: one number for each token, 0 if they are equal.

`js` is CD-MoE's (arXiv:2412.00069): Jensen-Shannon divergence of softmax over channels, in nats, ln 2 at most, with the
1e-10 that the published code adds to every probability. `kl` is one half of it, from the original to the other.

Shape letters:  T tokens   D channels
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Objective = Literal["js", "kl", "mse", "cosine"]
_EPSILON = 1e-10


def distances_to(objective: Objective, original_TD: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of other hidden states (T, D) that gives (T,); what it needs of the original is computed once."""
    if objective == "mse":
        return lambda other_TD: (other_TD - original_TD).square().mean(dim=1)
    if objective == "cosine":
        return lambda other_TD: 1 - F.cosine_similarity(other_TD, original_TD, dim=1)
    p_TD = original_TD.softmax(dim=1) + _EPSILON

    def of_softmax(other_TD: Tensor) -> Tensor:
        q_TD = other_TD.softmax(dim=1) + _EPSILON
        if objective == "kl":
            return (p_TD * (p_TD / q_TD).log()).sum(dim=1)
        m_TD = (p_TD + q_TD) / 2
        return (p_TD * (p_TD / m_TD).log() + q_TD * (q_TD / m_TD).log()).sum(dim=1) / 2

    return of_softmax
