"""Noise that belongs to a token: random numbers that depend on what they are for, not on who draws them or when.

A token's noise is a function of the seed, the layer and its number in the run alone (a counter-based generator, as in
Salmon et al., SC'11, here with the finaliser of splitmix64). So every layout draws the same, and so does a layer that
is computed a second time.
"""

import math

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def normal(numbers_T: Tensor, count: int, seed: int, stream: int) -> Tensor:
    """Standard normal numbers, (T, count) float32.

    Args:
        numbers_T: int64, of tokens; equal numbers get equal noise.
        count: of each.
        seed: of the run.
        stream: another one, other noise: the layer.
    """
    bits_TE = _bits(numbers_T, count, seed, stream)
    # Two uniform numbers of 24 bits each: a float32 holds no more.
    radius = (((bits_TE >> 40) & 0xFFFFFF) + 1).float() / (1 << 24)
    angle = (bits_TE & 0xFFFFFF).float() * (2 * math.pi / (1 << 24))
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)  # Box and Muller


def gumbel(numbers_T: Tensor, count: int, seed: int, stream: int) -> Tensor:
    """Numbers of the standard Gumbel distribution, -ln(-ln(u)), (T, count) float32; arguments as of `normal`."""
    bits_TE = _bits(numbers_T, count, seed, stream)
    uniform = (((bits_TE >> 41) & 0x7FFFFF).float() + 0.5) / (1 << 23)  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _bits(numbers_T: Tensor, count: int, seed: int, stream: int) -> Tensor:
    """64 random bits each, (T, count) int64."""
    counter_TE = numbers_T[:, None] * count + torch.arange(count, device=numbers_T.device)
    key = _mix(torch.tensor([seed * 65_537 + stream], device=numbers_T.device))
    return _mix(_mix(counter_TE) ^ key)


def _mix(x: Tensor) -> Tensor:
    x = x + _WEYL
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled up with zeros: torch's own fills up with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
