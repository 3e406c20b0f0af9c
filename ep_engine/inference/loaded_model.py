"""A checkpoint ready to compute, on one rank or on several that share its experts and whatever is asked of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from pydantic import ValidationError

from ep_engine import checkpoint
from ep_engine.c2r.constrain import constrained
from ep_engine.config import RoutingSection
from ep_engine.errors import UserError
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, first_sentence, in_words, read_model_config
from ep_engine.parallelize import build, entries_of
from ep_engine.placement import Placement, read_placement
from ep_engine.planning.what_if import rule_section

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Rule:
    """A selection rule in the place of the checkpoint's, as the command line has it.

    Attributes:
        rule: such as `c2r:16`; None: the checkpoint's own.
        profile: of which a rule of C2R makes its lists.
        placement: where experts live, and whose devices bound a token under c2r_grouped.
    """

    rule: str | None = None
    profile: Path | None = None
    placement: Path | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in evaluation mode, in float32, and the ranks that have it together."""

    model: Decoder
    config: ModelConfig
    meshes: Meshes
    device: torch.device

    def share_out(
        self, asked: Sequence[Asked], batch_size: int, work: Callable[[list[Asked]], Sequence[Answer]]
    ) -> Iterator[list[Answer]]:
        """Answers to `asked`, in its order, batch after batch; on every rank those of all.

        Args:
            asked: the same on every rank.
            batch_size: how many of them a rank works on at once.
            work: one answer for each of this rank's part of a batch, which may be empty: experts are shared, so
                every rank calls it equally often, and it runs the model equally often.
        """
        rank, size = dist.get_rank(self.meshes.world), dist.get_world_size(self.meshes.world)
        for start in range(0, len(asked), batch_size * size):
            batch = asked[start : start + batch_size * size]
            parts: list[Sequence[Answer]] = [()] * size
            dist.all_gather_object(parts, work(list(batch[rank::size])), group=self.meshes.saving)
            yield [parts[i % size][i // size] for i in range(len(batch))]


@contextmanager
def loaded(
    folder: Path, world: World, rule: Rule, *, most_tokens: int, timeout_s: float = 300.0
) -> Iterator[LoadedModel]:
    """Load an engine checkpoint on all ranks, who all call this, for as long as the block runs.

    Args:
        folder: the checkpoint.
        world: this process and its fellows.
        rule: by which experts are chosen.
        most_tokens: that a rank has in one pass.
        timeout_s: a rank that hears nothing from another for so long fails.

    Raises:
        UserError: `folder` is no checkpoint, or the rule is not for it.
    """
    config = ruled(folder, rule)
    placement, ep_size = _spread(config, rule.placement, world.size)
    device = world.pick_device("auto")
    settings = {"model_hash": checkpoint.hash_of_model(folder), "rule": config.moe and config.moe.routing.rule}
    with process_groups(world, device, ep_size, timeout_s, settings=settings) as meshes:
        (model,), _ = build(config, placement, meshes, device=device, dtype=torch.float32, tokens=most_tokens)
        checkpoint.load(folder, entries_of([model], experts=meshes.experts), group=meshes.world)
        yield LoadedModel(model.eval(), config, meshes, device)


def ruled(folder: Path, rule: Rule) -> ModelConfig:
    """The configuration of a checkpoint, under another rule if one is given; UserError as in `loaded`."""
    config, name = read_model_config(folder / "model.json"), rule.rule or ""
    config.check_predicts(str(folder))
    given = {"--rule": rule.rule, "--profile": rule.profile, "--placement": rule.placement}
    if config.is_dense:
        for option, value in given.items():
            if value is not None:
                raise UserError(f"{option} {value} needs a model with experts, {folder} is dense; leave it out")
    if rule.profile is not None and not name.startswith("c2r"):
        raise UserError(f"--profile {rule.profile} has no effect without a --rule of C2R; leave it out")
    if rule.rule is None:
        return config
    try:
        section = RoutingSection(**rule_section(rule.rule, rule.profile))
    except ValidationError as error:
        raise UserError(f"--rule {rule.rule}: {first_sentence(error)}") from None
    if name.startswith("c2r") and rule.profile is None:
        raise UserError(f"--rule {name} needs --profile, of which it makes lists; make one with `ep-engine profile`")
    if name.startswith("c2r_grouped") and rule.placement is None:
        raise UserError(
            f"--rule {name} needs --placement, whose devices bound a token; make one with `ep-engine place`"
        )
    placement = None if rule.placement is None else _fitting(rule.placement, config)
    return constrained(config, section, placement, folder)


def _spread(config: ModelConfig, path: Path | None, ranks: int) -> tuple[Placement | None, int]:
    """Where experts live, and the most ranks that can share them."""
    if config.is_dense:
        return None, 1
    if path is not None:
        placement = _fitting(path, config)
        return placement, max(size for size in placement.cuts if ranks % size == 0)
    ep_size = max(size for size in range(1, min(config.experts_of_layer()) + 1) if ranks % size == 0)
    return Placement.in_order(config.experts_of_layer(), ep_size), ep_size


def _fitting(path: Path, config: ModelConfig) -> Placement:
    placement = read_placement(path)
    if placement.experts_of_layer != config.experts_of_layer():
        raise UserError(
            f"--placement {path} has {in_words(placement.experts_of_layer)}, the model "
            f"{in_words(config.experts_of_layer())}; place a profile of this model"
        )
    return placement
