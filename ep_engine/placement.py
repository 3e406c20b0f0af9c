"""Where every expert lives: slots on devices, devices in a tree, and how an expert-parallel group cuts that tree.

A placement is metadata. On disk experts have logical ids, so any placement and any cut can load any checkpoint.

Letters:  E experts of a layer   D devices   S = ceil(E / D) slots of one device   P ranks of the expert-parallel group
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ep_engine.errors import UserError
from ep_engine.model_config import first_sentence
from ep_engine.ops import MAX_TREE_LEVELS
from ep_engine.output import whole_file


class Placement(BaseModel):
    """The expert in every slot of every layer: `placement.json`.

    Slot s lies on device s // S. The devices are the leaves of a tree whose levels have the given factors, outermost
    first; their product is D. Copies of a token are summed along this tree, so every expert-parallel size that is a
    cut of it (a product of leading factors) gives the same bits.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # what `place` measured is written beside, for people

    devices: int
    nodes: int = 1
    factors: tuple[int, ...]
    layers: list[list[int]]
    """[L][D * S]: expert id, -1 for an empty slot."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.devices < 1 or math.prod(self.factors) != self.devices or min(self.factors, default=1) < 1:
            raise ValueError(f"the factors of a placement {self.factors} must multiply to its devices ({self.devices})")
        if len(self.factors) >= MAX_TREE_LEVELS:
            raise ValueError(
                f"the tree of a placement must have fewer than {MAX_TREE_LEVELS} levels, got {self.factors}; merge some"
            )
        if self.nodes not in _products(self.factors):
            raise ValueError(f"nodes ({self.nodes}) must be a product of leading factors {self.factors}; reorder them")
        if not self.layers:
            raise ValueError("layers of a placement must not be empty; place again")
        for i, slots in enumerate(self.layers):
            held = sorted(e for e in slots if e >= 0)
            if held != list(range(len(held))) or not held:
                raise ValueError(
                    f"layer {i} of the placement ({max(held, default=-1) + 1} experts) must hold each expert once, got "
                    f"{slots}; place again"
                )
            if len(slots) != self.devices * _slots_per_device(len(held), self.devices):
                raise ValueError(
                    f"layer {i} of the placement has {len(slots)} slots, {len(held)} experts on {self.devices} devices "
                    f"need {self.devices * _slots_per_device(len(held), self.devices)}; place again"
                )
        return self

    @classmethod
    def contiguous(cls, num_experts: int, devices: int, num_layers: int, *, nodes: int = 1) -> Self:
        """`in_order` for layers of the same number of experts."""
        return cls.in_order([num_experts] * num_layers, devices, nodes=nodes)

    @classmethod
    def in_order(cls, experts_of_layer: Sequence[int], devices: int, *, nodes: int = 1) -> Self:
        """Experts in the order of their ids, on a tree of the prime factors of nodes and of devices per node."""
        fewest = min(experts_of_layer)
        if not 1 <= devices <= fewest:
            raise UserError(
                f"{fewest} experts do not fit {devices} devices, each must hold at least one; use fewer devices"
            )
        if devices % nodes:
            raise UserError(f"nodes ({nodes}) must divide devices ({devices}); give every node the same number")
        factors = [*prime_factors(nodes), *prime_factors(devices // nodes)] or [1]
        while len(factors) >= MAX_TREE_LEVELS:  # one level is the devices' own
            factors[-2:] = [factors[-2] * factors[-1]]
        layers = [_spread(num_experts, devices) for num_experts in experts_of_layer]
        return cls(devices=devices, nodes=nodes, factors=tuple(factors), layers=layers)

    @property
    def experts_of_layer(self) -> list[int]:
        """[L]: E of every layer."""
        return [sum(expert >= 0 for expert in slots) for slots in self.layers]

    def slots_per_device(self, layer: int) -> int:
        """S."""
        return len(self.layers[layer]) // self.devices

    @property
    def cuts(self) -> list[int]:
        """Expert-parallel sizes that cut the tree, ascending."""
        return _products(self.factors)

    def device_of_expert(self, layer: int) -> list[int]:
        """[E]: the device of every expert of a layer."""
        return [slot // self.slots_per_device(layer) for slot in self.slot_of_expert(layer)]

    def slot_of_expert(self, layer: int) -> list[int]:
        """[E]: the slot of every expert of a layer, in [0, D * S)."""
        slots = self.layers[layer]
        return sorted((s for s in range(len(slots)) if slots[s] >= 0), key=lambda s: slots[s])

    def cut(self, ep_size: int, layer: int = 0) -> "Cut":
        """How P ranks share the tree and the slots of a layer; UserError if P is no product of leading factors."""
        sizes = _products(self.factors)
        if ep_size not in sizes:
            raise UserError(
                f"parallel.expert_parallel_size ({ep_size}) is no cut of the placement's tree {self.factors} of "
                f"{self.devices} devices; use one of {', '.join(map(str, dict.fromkeys(sizes)))}, or place for "
                f"{ep_size} devices"
            )
        above = [f for f in self.factors[: sizes.index(ep_size)] if f > 1]
        below = [f for f in self.factors[sizes.index(ep_size) :] if f > 1]
        return Cut(
            ep_size=ep_size,
            slots_per_rank=len(self.layers[layer]) // ep_size,
            group_sizes_of_slots=_running(self.slots_per_device(layer), reversed(below)),
            group_sizes_of_ranks=_running(1, reversed(above))[1:] or [1],
        )

    def save(self, path: Path, **measured: object) -> None:
        """Write `placement.json`; `measured` is kept beside the placement, for people."""
        with whole_file(path) as beside:
            beside.write_text(json.dumps(self.model_dump(mode="json") | measured) + "\n")


@dataclass(frozen=True)
class Cut:
    """A tree cut into P ranks: what a rank sums by itself, and what the token's home sums of the ranks' rows."""

    ep_size: int
    slots_per_rank: int
    group_sizes_of_slots: list[int]  # slots of a group at each level inside a rank, innermost (one device) first
    group_sizes_of_ranks: list[int]  # ranks of a group at each level above the ranks, innermost first

    def in_parts(self, parts: int) -> "Cut":
        """The same where as many ranks share the experts of one, each with a part of every expert."""
        if parts == 1:
            return self
        sizes = [parts, *(parts * size for size in self.group_sizes_of_ranks if size > 1)]
        return replace(self, ep_size=parts * self.ep_size, group_sizes_of_ranks=sizes)


def read_placement(path: Path) -> Placement:
    """Read `placement.json`; UserError if it is missing or does not hold each expert once."""
    try:
        return Placement.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"placement {path} cannot be read ({error.strerror}); make one with `ep-engine place`"
        ) from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_sentence(error)}") from None


def prime_factors(number: int) -> tuple[int, ...]:
    """Prime factors in ascending order; () for 1."""
    factors, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return tuple(factors)


def _slots_per_device(num_experts: int, devices: int) -> int:
    return -(-num_experts // devices)


def _spread(num_experts: int, devices: int) -> list[int]:
    """Evenly: with 60 experts on 8 devices no device is left with much less than the others."""
    per_device = _slots_per_device(num_experts, devices)
    slots = [-1] * (devices * per_device)
    for expert in range(num_experts):
        device = expert * devices // num_experts
        first = -(-device * num_experts // devices)
        slots[device * per_device + expert - first] = expert
    return slots


def _products(factors: tuple[int, ...]) -> list[int]:
    """1, f0, f0 * f1, ..."""
    return _running(1, factors)


def _running(first: int, factors: Iterable[int]) -> list[int]:
    products = [first]
    for factor in factors:
        products.append(products[-1] * factor)
    return products
