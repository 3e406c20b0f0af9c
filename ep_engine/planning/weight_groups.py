"""Weight groups: which weights of a rank FSDP2 gathers and reduces together, as `parallelize.py` wraps them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ep_engine.config import RunConfig
from ep_engine.entries import expected_entries
from ep_engine.model_config import ModelConfig
from ep_engine.parallelize import slices_experts
from ep_engine.placement import Placement
from ep_engine.planning.expert_traffic import Groups
from ep_engine.training.trained import frozen_weights

_FLOAT = 4
EXPERTS = ("w_gate_up", "w_down")


@dataclass(frozen=True)
class Weights:
    """Weights that FSDP gathers and whose gradients it sums together."""

    shapes: tuple[tuple[int, ...], ...]  # as they are gathered
    axis: str  # of the ranks that share them, along the first dim
    ranks: int  # their number
    position: int  # of this rank among them
    itemsize: int  # of computation
    reshard: bool  # after a forward
    sliced: bool = False  # along another dim in memory than the first of `shapes`
    frozen: tuple[int, ...] = ()  # places in `shapes` of those that have neither gradients nor moments

    @property
    def trained(self) -> "Weights":
        """Those of them that have."""
        shapes = (shape for place, shape in enumerate(self.shapes) if place not in self.frozen)
        return replace(self, shapes=tuple(shapes), frozen=())

    @property
    def alone(self) -> bool:
        """Whether FSDP has nothing to do: one rank holds them, as they are computed with."""
        return self.ranks == 1 and self.itemsize == _FLOAT

    @property
    def gathered(self) -> int:
        """Elements, with those that make the parts of all ranks alike."""
        return sum(-(-shape[0] // self.ranks) * self.ranks * math.prod(shape[1:]) for shape in self.shapes)

    @property
    def share(self) -> int:
        """Elements of a rank's part."""
        return self.gathered // self.ranks

    @property
    def own(self) -> int:
        """Elements of this rank's part that are weights."""
        parts = ((-(-shape[0] // self.ranks), shape) for shape in self.shapes)
        return sum(max(0, min(part, shape[0] - self.position * part)) * math.prod(shape[1:]) for part, shape in parts)

    @property
    def largest(self) -> int:
        """Elements of the largest weight."""
        return max((math.prod(shape) for shape in self.shapes), default=0)


@dataclass(frozen=True)
class StageWeights:
    """The weights of a stage: of every layer in the order in which they are gathered, experts last, and the rest."""

    layers: dict[int, list[Weights]]
    root: Weights

    def all(self) -> list[Weights]:
        """All of them, in the order of a forward."""
        return [self.root, *(weights for of_layer in self.layers.values() for weights in of_layer)]


def frozen_of(config: RunConfig, model: ModelConfig) -> set[str]:
    """Weights without gradients, by the names of modules, in which the experts of a layer are two."""
    names = [name for name in expected_entries(model) if ".experts." not in name]
    names += [f"layers.{layer}.moe.experts.{name}" for layer in model.moe_layers() for name in EXPERTS]
    frozen = frozen_weights(names, model, config.train.trainable, config.train.freeze)
    moved = (".router.bias",) if config.balance.noise else (".router.bias", ".router.w_noise")  # not by gradients
    return frozen | {name for name in names if name.endswith(moved)}


def stage_weights(
    config: RunConfig, model: ModelConfig, placement: Placement | None, groups: Groups, rank: int, layers: range
) -> StageWeights:
    """How `parallelize.py` groups the weights of a stage on a rank."""
    parallel = config.parallel
    tp, itemsize = parallel.tensor_parallel_size, 4 if config.train.dtype == "float32" else 2
    shapes = {name: _cut(name, shape, tp) for name, shape in expected_entries(model).items() if ".experts." not in name}

    frozen = frozen_of(config, model)

    def places(names: Sequence[str]) -> tuple[int, ...]:
        return tuple(place for place, name in enumerate(names) if name in frozen)

    def group(names: Sequence[str], axis: str, size: int = itemsize, *, reshard: bool | None = None) -> Weights:
        ranks = groups.around(rank, axis)
        given = tuple(shapes[name] for name in names)
        keep = parallel.reshard_after_forward if reshard is None else reshard
        return Weights(given, axis, len(ranks), ranks.index(rank), size, keep, frozen=places(names))

    apart = tp > 1 or itemsize < _FLOAT
    of_layer: dict[int, list[Weights]] = {}
    for i in layers:
        names = [name for name in shapes if name.startswith(f"layers.{i}.")]
        routers = [name for name in names if ".router." in name and apart]
        alone = ("norm.weight", "shared_gate.weight", "residual.gate.weight", "residual_weighting.weight")
        norms = [name for name in names if name.endswith(alone) and tp > 1]
        if tp > 1 and i == model.num_layers - 1:
            norms.append("norm.weight")  # by itself as they are, and as small
        of_layer[i] = [group([name for name in names if name not in routers + norms], "dp")]
        of_layer[i] += [group([name], "stage") for name in norms]
        if routers:
            of_layer[i].append(group(routers, "stage", _FLOAT))
        if model.moe_of(i) is not None and model.moe is not None and placement is not None:
            slots = placement.cut(parallel.expert_parallel_size, model.moe_index(i)).slots_per_rank
            width, d = model.moe.expert_hidden_size // parallel.expert_tensor_parallel_size, model.hidden_size
            edp = groups.around(rank, "edp")
            sliced = slices_experts(slots, d, len(edp))
            first, *others = (d, slots) if sliced else (slots, d)
            experts = ((first, 2 * width, *others), (first, *others, width))
            keep = parallel.reshard_after_forward
            still = places([f"layers.{i}.moe.experts.{name}" for name in EXPERTS])
            of_layer[i].append(Weights(experts, "edp", len(edp), edp.index(rank), itemsize, keep, sliced, still))
    first, last = layers.start == 0, layers.stop == model.num_layers
    root = ["embed.weight"] if first or (last and model.tie_embeddings) else []
    root += ["head.weight"] if last and not model.tie_embeddings else []
    root += ["norm.weight"] if last and tp == 1 else []
    return StageWeights(of_layer, group(root, "dp", reshard=False))


def _cut(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """What tensor parallelism leaves of a weight."""
    if (
        "norm" in name
        or ".router." in name
        or ".shared_gate." in name
        or ".residual.gate." in name
        or ".residual_weighting." in name
        or (".w_o.bias" in name or ".w_down.bias" in name)
    ):
        return shape
    if name.endswith((".w_o.weight", ".w_down.weight")):
        return shape[0], shape[1] // tp
    return shape[0] // tp, *shape[1:]
