"""What a feature or a gradient counts: itself, its absolute value, or its square (LLaMA-MoE's kernels)."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["plain", "l1_norm", "l2_norm"]

KERNELS: Mapping[Kernel, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "l1_norm": torch.abs,
    "l2_norm": torch.square,
}
