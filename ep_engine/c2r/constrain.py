"""Constrain: from the [routing] section of a run to the selection rule in its model, tables and all."""

from pathlib import Path

from pydantic import ValidationError

from ep_engine.c2r.collaboration import collaboration_lists, read_profile
from ep_engine.c2r.published import read_lists
from ep_engine.checkpoint import hash_of_model
from ep_engine.config import RoutingSection, RunConfig, differing
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig, first_sentence, in_words
from ep_engine.placement import Placement

_READ_BY_RULE: dict[str | None, set[str]] = {
    None: set(),
    "topk": {"rule"},
    "group_limited": {"rule", "num_groups", "max_devices", "tighten_steps", "weights"},
    "c2r": {"rule", "profile", "top_t", "tighten_steps", "weights"},
    "c2r_grouped": {"rule", "profile", "top_t", "max_devices", "tighten_steps", "weights"},
}


def routed(config: RunConfig, model: ModelConfig, placement: Placement | None) -> ModelConfig:
    """The model with the run's selection rule in the place of its own.

    Raises:
        UserError: a key has no effect on the rule or is missing, or a table is not for this model or placement.
    """
    routing = config.routing
    if model.moe is None or placement is None:
        return model
    unread = [name for name in differing(routing) if name not in _READ_BY_RULE[routing.rule]]
    if routing.rule is None and unread:
        raise UserError(f"routing.{unread[0]} is set without routing.rule and has no effect; set the rule too")
    if unread:
        raise UserError(f"routing.{unread[0]} has no effect on routing.rule {routing.rule}; leave it out")
    if routing.rule is None:
        _check_groups(model.moe, placement, config.parallel.expert_parallel_size)
        return model
    return constrained(model, routing, None if config.moe.placement is None else placement, config.model.checkpoint)


def constrained(
    model: ModelConfig, routing: RoutingSection, placement: Placement | None, checkpoint: Path | None
) -> ModelConfig:
    """A model with experts under another rule.

    Args:
        model: the model.
        routing: names the rule.
        placement: whose devices bound a token; None: there is none, which c2r_grouped needs.
        checkpoint: the model's, which a profile must be of; None: it is new.

    Raises:
        UserError: a table is missing, or not for this model or placement.
    """
    assert model.moe is not None, "the caller has asked"
    tables = RoutingConfig(rule=routing.rule or "topk", weights=routing.weights)
    if routing.rule == "group_limited":
        tables = tables.model_copy(update={"num_groups": routing.num_groups, "max_devices": routing.max_devices})
    if routing.rule in ("c2r", "c2r_grouped"):
        lists, published_t = _lists(routing, model, checkpoint)
        top_t = published_t if routing.top_t is None else routing.top_t
        tables = tables.model_copy(update={"top_t": top_t, "lists": lists})
    if routing.rule == "c2r_grouped":
        if placement is None:
            raise UserError(
                "routing.rule c2r_grouped needs moe.placement, whose devices bound a token; make one with "
                "`ep-engine place`"
            )
        most = max(routing.max_devices) if isinstance(routing.max_devices, list) else routing.max_devices
        if most > placement.devices:
            raise UserError(
                f"routing.max_devices ({most}) is more than the placement's {placement.devices} "
                "devices; choose fewer, or the rule c2r"
            )
        devices = [placement.device_of_expert(layer) for layer in range(len(model.moe_layers()))]
        tables = tables.model_copy(update={"max_devices": routing.max_devices, "device_of_expert": devices})
    try:
        return ModelConfig(**{**model.model_dump(), "moe": {**model.moe.model_dump(), "routing": tables.model_dump()}})
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None


def in_no_list(model: ModelConfig) -> dict[int, list[int]]:
    """By MoE layer, the experts that are among the first T collaborators of nobody: they serve only tokens whose first
    choice they are.
    """
    found = {}
    moe = model.moe
    if moe is None or moe.routing.lists is None:
        return {}
    for layer, rows in enumerate(moe.routing.lists):
        top_t, _ = moe.routing.in_layer(layer)
        named = {expert for row in rows for expert in row[:top_t]}
        if len(named) < len(rows):
            found[layer] = [expert for expert in range(len(rows)) if expert not in named]
    return found


def _lists(
    routing: RoutingSection, model: ModelConfig, checkpoint: Path | None
) -> tuple[list[list[list[int]]], int | None]:
    """Collaboration lists of all layers, and the T that stands beside them, if one does."""
    assert model.moe is not None, "the caller has asked"
    if routing.profile is None:
        raise UserError(f"routing.rule {routing.rule} needs routing.profile; make one with `ep-engine profile`")
    if routing.profile.suffix in (".json", ".pkl"):
        lists, top_t = read_lists(routing.profile)
        _check_shape(routing.profile, [len(rows) for rows in lists], model)
        return lists, top_t
    profile = read_profile(routing.profile)
    _check_shape(routing.profile, profile.experts_of_layer, model)
    made_of = profile.about.get("model_hash")
    if checkpoint is not None and made_of is not None:
        found = hash_of_model(checkpoint)
        if found != made_of:
            raise UserError(
                f"routing.profile {routing.profile} is of another model ({made_of[:12]}) than model.checkpoint "
                f"{checkpoint} ({found[:12]}); profile that one"
            )
    return collaboration_lists(profile.counts_of_layer), None


def _check_shape(path: Path, experts_of_layer: list[int], model: ModelConfig) -> None:
    if experts_of_layer != model.experts_of_layer():
        raise UserError(
            f"routing.profile {path} has {in_words(experts_of_layer)}, the model "
            f"{in_words(model.experts_of_layer())}; profile this model"
        )


def _check_groups(moe: MoEConfig, placement: Placement, ep_size: int) -> None:
    """The groups that a c2r_grouped model was trained with must each lie on one rank, or M would bound nothing."""
    for layer, device_of_expert in enumerate(moe.routing.device_of_expert or []):
        slots_per_rank = placement.cut(ep_size, layer).slots_per_rank
        ranks = [slot // slots_per_rank for slot in placement.slot_of_expert(layer)]
        if len(set(zip(device_of_expert, ranks, strict=True))) > len(set(device_of_expert)):
            raise UserError(
                f"the model's rule is c2r_grouped, and its devices {device_of_expert} of layer {layer} are torn apart "
                f"by ranks {ranks}; set moe.placement to the one it was trained with, or set routing.rule"
            )
