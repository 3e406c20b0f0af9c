"""Where an entry of the engine lies among the tensors of a Hugging Face folder, and the way there and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_engine.deferred import Deferred, Tensors
from ep_engine.errors import Fault


@dataclass(frozen=True)
class Stacked:
    """A key whose tensor holds all experts of a layer, each transposed: (E, in, out), as MoLlama stores them."""

    key: str


@dataclass(frozen=True)
class Place:
    """Of one entry.

    Attributes:
        key: the tensor.
        index: of the entry's transpose in its first dim; None: the tensor is the entry.
        size: hidden width of an expert that is padded with zeros in the engine; None: it is not.
    """

    key: str
    index: int | None = None
    size: int | None = None

    def shape(self, entry: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the folder holds of an entry of this shape; of a stacked tensor, its part."""
        if self.size is not None:
            shape = (shape[0], self.size) if entry.endswith("w_down") else (self.size, shape[1])
        return shape if self.index is None else shape[::-1]

    def to_engine(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The entry, of its shape in the engine, from the tensor of the folder; a view where that is possible."""
        if self.index is not None:
            tensor = tensor[self.index].t()
        if tuple(tensor.shape) == shape:
            return tensor
        padded = tensor.new_zeros(shape)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        return padded

    def from_engine(self, entry: str, tensor: Tensor) -> Tensor:
        """The part of the folder's tensor that an entry is; Fault if padding is not zero."""
        if self.size is not None:
            dim = 1 if entry.endswith("w_down") else 0
            rest = tensor.narrow(dim, self.size, tensor.shape[dim] - self.size)
            if rest.any():
                raise Fault(
                    f"{entry} has weights behind its {self.size} hidden neurons, which are padding; this is our bug, "
                    "report it"
                )
            tensor = tensor.narrow(dim, 0, self.size)
        return tensor if self.index is None else tensor.t()


def shapes_of_keys(places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the folder must hold, from those of the entries."""
    found: dict[str, tuple[int, ...]] = {}
    for entry, place in places.items():
        shape = place.shape(entry, shapes[entry])
        if place.index is None:
            found[place.key] = shape
        else:
            count, *_ = found.get(place.key, (0,))
            found[place.key] = (max(count, place.index + 1), *shape)
    return found


def tensors_of_keys(places: Mapping[str, Place], tensors: Tensors) -> Tensors:
    """Every tensor of the folder, in the order of the entries."""
    entries: dict[str, list[str]] = {}
    for entry, place in places.items():
        entries.setdefault(place.key, []).append(entry)
    shapes = shapes_of_keys(places, {entry: tensors.deferred[entry].shape for entry in places})

    def make(members: list[str]) -> Callable[[], Tensor]:
        def whole() -> Tensor:
            parts = [places[entry].from_engine(entry, tensors[entry]) for entry in members]
            return parts[0] if places[members[0]].index is None else torch.stack(parts)

        return whole

    return Tensors(
        {
            key: Deferred(shapes[key], tensors.deferred[members[0]].dtype, make(members))
            for key, members in entries.items()
        }
    )
