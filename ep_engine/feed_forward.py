"""Dense SwiGLU: the FFN of a dense layer, and what every token of a MoE layer goes through beside its experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine.model_config import CondensedLayer


class FeedForward(nn.Module):
    """w_down (silu(w_gate x) * w_up x), arXiv:2002.05202 eq. 6; of a condensed layer, with factors before w_down."""

    def __init__(
        self, hidden_size: int, inner_size: int, *, bias: bool = False, condensed: CondensedLayer | None = None
    ) -> None:
        super().__init__()
        self.w_gate = nn.Linear(hidden_size, inner_size, bias=bias)
        self.w_up = nn.Linear(hidden_size, inner_size, bias=bias)
        self.w_down = nn.Linear(inner_size, hidden_size, bias=bias)
        self.shared_gate = SharedGate(hidden_size) if condensed is not None and condensed.gated else None
        has_factors = condensed is not None and (condensed.gated or condensed.scales)
        self.blocks = condensed.blocks(inner_size) if condensed is not None and has_factors else []

    def keep_channels(self, first: int, count: int) -> None:
        """This rank has only some channels of the inside: forget the factors of the others."""
        end, kept = 0, []
        for size, factor in self.blocks:
            begin, end = end, end + size
            kept.append((max(0, min(end, first + count) - max(begin, first)), factor))
        self.blocks = kept

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inside = F.silu(self.w_gate(x)) * self.w_up(x)
        if self.blocks:
            parts = list(inside.split([size for size, _ in self.blocks], dim=-1))
            parts = [
                part if factor == 1.0 else part * factor for part, (_, factor) in zip(parts, self.blocks, strict=True)
            ]
            if self.shared_gate is not None:
                parts[0] = self.shared_gate(x) * parts[0]  # on every rank, if only with no channels: it has a gradient
            inside = torch.cat(parts, dim=-1)
        y: Tensor = self.w_down(inside)
        return y


class ResidualExperts(nn.Module):
    """Experts that every token goes through, weighted by a softmax gate: LLaMA-MoE's residual block."""

    def __init__(self, hidden_size: int, inner_size: int, count: int, scale: float) -> None:
        super().__init__()
        self.gate = ResidualGate(hidden_size, count, scale)
        self.each = nn.ModuleList(FeedForward(hidden_size, inner_size) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        shares = self.gate(x).unbind(dim=-1)
        weighted = (share.unsqueeze(-1) * expert(x) for share, expert in zip(shares, self.each, strict=True))
        total: Tensor = sum(weighted)
        return total


class ResidualGate(nn.Module):
    """The weights of a token's residual experts, or of the chosen and the residual ones: softmax(w x) * scale."""

    def __init__(self, hidden_size: int, count: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, count, bias=False).weight
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., r)."""
        return F.linear(x, self.weight).float().softmax(dim=-1).to(x.dtype) * self.scale


class SharedGate(nn.Module):
    """The share of the shared expert's output that a token takes, as in Qwen2-MoE: sigmoid(w x)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, 1, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 1)."""
        return F.linear(x, self.weight).sigmoid()
