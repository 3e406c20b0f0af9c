"""Tensors that are made when they are asked for, so that a model of any size passes through a small memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """One tensor: what it will be, and what makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> "Deferred":
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Tensors(Mapping[str, Tensor]):
    """Tensors by name; each is made anew whenever it is asked for, and nobody here keeps it."""

    def __init__(self, deferred: Mapping[str, Deferred]) -> None:
        self.deferred = deferred

    def __getitem__(self, name: str) -> Tensor:
        return self.deferred[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.deferred)

    def __len__(self) -> int:
        return len(self.deferred)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Tensors":
        """Those that are there already."""
        return cls({name: Deferred.of(tensor) for name, tensor in tensors.items()})
