"""Dense SwiGLU: the FFN of a dense layer, and what every token of a MoE layer goes through beside its experts."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """w_down (silu(w_gate x) * w_up x), arXiv:2002.05202 eq. 6."""

    def __init__(self, hidden_size: int, inner_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w_gate = nn.Linear(hidden_size, inner_size, bias=bias)
        self.w_up = nn.Linear(hidden_size, inner_size, bias=bias)
        self.w_down = nn.Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))
        return y


class SharedGate(nn.Module):
    """The share of the shared expert's output that a token takes, as in Qwen2-MoE: sigmoid(w x)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, 1, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 1)."""
        return F.linear(x, self.weight).sigmoid()
