"""What is computed again for the backward instead of being kept."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]
"""Nothing; attention, the shared expert, and experts' gate and up; every layer as a whole."""
T = TypeVar("T")


def computed_again(function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs), of which only the inputs are kept; what its backward needs is computed a second time."""
    result: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
