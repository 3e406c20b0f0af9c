"""Attention: causal, grouped queries, rotary positions, a window, and documents in one row that do not see each other.

Shape letters:  B rows   S positions   D model dim   H heads   G key/value heads   d dim of a head   N documents
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine.kv_cache import KVCache
from ep_engine.model_config import ModelConfig
from ep_engine.norm import RMSNorm


class Positions:
    """The rotary table and the window of a model, which its layers share; made anew for another length."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._table: tuple[int, torch.device, tuple[Tensor, Tensor]] | None = None
        self._window: tuple[torch.Size, torch.device, Tensor | None] | None = None

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines, see `rotary_table`."""
        if self._table is None or self._table[:2] != (length, device):
            self._table = length, device, rotary_table(self._config, length, device)
        return self._table[2]

    def window(self, rows: int, length: int, device: torch.device) -> Tensor | None:
        """What `keep_apart` gives for rows of one document each; None if the window, if any, is as long as they are."""
        width, shape = self._config.sliding_window, torch.Size((rows if device.type == "cuda" else 1, length))
        if width is None or width >= length:
            return None
        if self._window is None or self._window[:2] != (shape, device):
            self._window = shape, device, keep_apart(torch.zeros(shape, dtype=torch.int64, device=device), width)
        return self._window[2]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; queries and keys may be normed."""

    def __init__(self, config: ModelConfig, positions: Positions) -> None:
        super().__init__()
        d, head_dim, bias = config.hidden_size, config.head_dim, bool(config.attention_bias)
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.head_dim, self.positions, self.window = head_dim, positions, config.sliding_window
        self.w_q = nn.Linear(d, q_size, bias=bias)
        self.w_k = nn.Linear(d, kv_size, bias=bias)
        self.w_v = nn.Linear(d, kv_size, bias=bias)
        self.w_o = nn.Linear(q_size, d, bias=config.attention_bias is True)
        self.qk_norm = config.qk_norm
        if config.qk_norm is not None:
            each = config.qk_norm == "head"
            self.q_norm = RMSNorm(head_dim if each else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim if each else kv_size, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, apart: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); `apart` from `keep_apart`, None: a row is one document.

        With a cache the positions are the last of rows whose others it knows, and `apart` is from its `begin`.
        """
        q, k, v = (w(x_BSD) for w in (self.w_q, self.w_k, self.w_v))
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (self._heads(x) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        length = q.shape[2]
        cos, sin = self.positions.table(length if cache is None else cache.capacity, q.device)
        if cache is not None:
            cos, sin = (table[cache.positions_BS].unsqueeze(1) for table in (cos, sin))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        elif apart is None:
            apart = self.positions.window(len(q), length, q.device)
        y_BHSd = attend(q, k, v, apart, self.window)
        out: Tensor = self.w_o(y_BHSd.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * d) -> (B, heads, S, d)."""
        apart: Tensor = x.unflatten(2, (-1, self.head_dim))
        return apart.transpose(1, 2)


def keep_apart(documents_BS: Tensor, window: int | None = None) -> Tensor:
    """What `attend` needs so that a token sees only its own document, and no more of it than a window.

    Args:
        documents_BS: integers that differ between documents that follow each other in a row.
        window: positions that a token sees, itself among them; None: all before it.

    Returns:
        On CPU who sees whom, (B, 1, S, S) bool; on a GPU where documents begin among all B * S tokens, and the end,
        (N + 1,) int32, whose number the host must know.
    """
    if documents_BS.is_cuda:
        begins = documents_BS.diff(dim=1, prepend=documents_BS[:, :1] - 1) != 0
        ends = torch.tensor([documents_BS.numel()], device=documents_BS.device)
        return torch.cat((begins.flatten().nonzero().flatten(), ends)).int()
    seen_BSS = (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)).tril()
    return (seen_BSS if window is None else seen_BSS.triu(1 - window)).unsqueeze(1)


def attend(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, apart: Tensor | None, window: int | None = None) -> Tensor:
    """Causal attention, (B, H, S, d); heads in groups share keys and values. `apart` is from `keep_apart`."""
    shared = q_BHSd.shape[1] != k_BGSd.shape[1]
    if apart is None:
        return F.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=shared)
    if apart.dtype == torch.bool:
        return F.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSd, attn_mask=apart, enable_gqa=shared)
    from torch.nn.attention.varlen import varlen_attn  # flash-attn as torch has it, for 16-bit floats

    rows, _, length, _ = q_BHSd.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSd, k_BGSd, v_BGSd))
    before = -1 if window is None else window - 1
    y = varlen_attn(q, k, v, apart, apart, length, length, window_size=(before, 0), enable_gqa=shared)
    assert isinstance(y, Tensor), "nothing else was asked for"
    return y.view(rows, length, *y.shape[1:]).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout of Hugging Face: (B, heads, S, d) with tables (S, d) or (B, 1, S, d),
    in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..length-1, (S, head_dim) float32 each, arXiv:2104.09864 eq. 34."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Frequencies for contexts longer than the model was trained on, as transformers' rope types do it."""
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    stretched: Tensor = frequencies / factor
    if scaling["rope_type"] == "linear":
        return stretched
    assert scaling["rope_type"] == "llama3", "conversion refuses other types"
    # Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended.
    old_length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old_length * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, blend)
