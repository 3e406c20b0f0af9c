"""The selection rule in config.json: `top_t` and `collaborative_list` as C2R publishes them, and ours beside them."""

from collections.abc import Mapping
from typing import Any

from ep_engine.model_config import RoutingConfig

ROUTING_KEYS = frozenset(
    {"routing_rule", "top_t", "collaborative_list", "max_devices", "device_of_expert", "num_groups", "routing_weights"}
)


def read_routing(config: Mapping[str, Any]) -> RoutingConfig:
    """The rule of config.json; lists alone mean c2r, as in the published files."""
    lists = config.get("collaborative_list")
    return RoutingConfig(
        rule=config.get("routing_rule") or ("topk" if lists is None else "c2r"),
        top_t=config.get("top_t"),
        lists=lists,
        max_devices=config.get("max_devices"),
        device_of_expert=config.get("device_of_expert"),
        num_groups=config.get("num_groups"),
        weights=config.get("routing_weights") or "model",
    )


def write_routing(routing: RoutingConfig) -> dict[str, Any]:
    """Keys of a rule that is not plain top-k; those that it does not read are left out."""
    if routing.rule == "topk":
        return {}
    config: dict[str, Any] = {"routing_rule": routing.rule}
    if routing.weights != "model":
        config["routing_weights"] = routing.weights
    if routing.rule == "group_limited":
        config |= {"num_groups": routing.num_groups, "max_devices": routing.max_devices}
    if routing.rule in ("c2r", "c2r_grouped"):
        config |= {"top_t": routing.top_t, "collaborative_list": routing.lists}
    if routing.rule == "c2r_grouped":
        config |= {"max_devices": routing.max_devices, "device_of_expert": routing.device_of_expert}
    return config
