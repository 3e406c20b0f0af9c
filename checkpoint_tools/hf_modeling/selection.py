"""Which experts serve a token, under the rules of constrained routing (C2R, arXiv:2504.01337).

Shape suffixes: T tokens, E experts, K experts chosen per token.
"""

from typing import Any

import torch
from torch import Tensor


def select_experts(
    scores_TE: Tensor,
    top_k: int,
    *,
    list_EE: Tensor | None = None,
    top_t: int = 0,
    device_E: Tensor | None = None,
    max_devices: int = 0,
) -> Tensor:
    """Choose the experts of every token; equal scores go to the lower expert id.

    Args:
        scores_TE: (T, E) fp32, any order-preserving function of the router's logits.
        top_k: K in 1..E.
        list_EE: (E, E) int64; row i lists all experts, closest collaborator of i first, i last. None: plain top-k.
        top_t: T of C2R in K-1..E-1: the candidates are the first T of the row of the top-1 expert.
        device_E: (E,) int64, the device of every expert, in 0.., or its group; None: no bound on devices.
        max_devices: M: the experts of a token live on at most M devices, the top-1 expert's among them. Candidates
            outside are dropped; if fewer than K-1 remain, the row is followed further, inside those devices.

    Returns:
        (T, K) int64, column 0 the top-1 expert, the others by falling score.
    """
    order_TE = scores_TE.sort(dim=1, descending=True, stable=True).indices
    first_T1 = order_TE[:, :1]
    if top_k == 1 or (list_EE is None and device_E is None):
        return order_TE[:, :top_k]
    if list_EE is None:
        outside_TE = ~_on_first_devices(order_TE, device_E, max_devices).gather(1, order_TE)
        return order_TE.gather(1, outside_TE.to(torch.uint8).sort(dim=1, stable=True).indices)[:, :top_k]
    row_TE = list_EE[first_T1[:, 0]][:, :-1]  # the top-1 expert itself stands last and is no candidate
    inside_TE = torch.ones_like(row_TE, dtype=torch.bool)
    if device_E is not None:
        inside_TE = _on_first_devices(order_TE, device_E, max_devices).gather(1, row_TE)
    near = torch.arange(row_TE.shape[1], device=row_TE.device) < top_t
    open_TE = inside_TE & (near | (inside_TE.cumsum(dim=1) <= top_k - 1))
    candidate_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, row_TE, open_TE)
    # A stable sort of "is no candidate" along the score order brings the candidates forward and keeps their order.
    forward_TE = (~candidate_TE.gather(1, order_TE)).to(torch.uint8).sort(dim=1, stable=True).indices
    return torch.cat((first_T1, order_TE.gather(1, forward_TE)[:, : top_k - 1]), dim=1)


def _on_first_devices(order_TE: Tensor, device_E: Tensor, max_devices: int) -> Tensor:
    """(T, E) bool: the expert lives on one of the first `max_devices` distinct devices named along the score order."""
    num_experts = order_TE.shape[1]
    position_TE = torch.empty_like(order_TE).scatter(
        1, order_TE, torch.arange(num_experts, device=order_TE.device).expand_as(order_TE)
    )
    device_TE = device_E.expand_as(order_TE)
    named_at_TP = torch.full_like(order_TE, num_experts)  # a device id is at most E - 1 after renumbering
    named_at_TP = named_at_TP.scatter_reduce(1, device_TE, position_TE, reduce="amin")
    rank_TP = named_at_TP.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank_TP.gather(1, device_TE) < max_devices


def routing_tables(config: Any, num_experts: int, index: int, device: torch.device) -> dict[str, Any]:
    """Arguments of `select_experts` for one layer, `index` among those with experts; {} for plain top-k."""
    if config.routing_rule == "group_limited":
        groups = torch.arange(num_experts, device=device) * config.num_groups // num_experts
        return {"device_E": groups, "max_devices": of_layer(config.max_devices, index)}
    if config.routing_rule == "topk" or config.collaborative_list is None:
        return {}
    rows_EE = torch.tensor(config.collaborative_list[index], device=device)
    tables = {"list_EE": rows_EE, "top_t": of_layer(config.top_t, index)}
    if config.routing_rule == "c2r_grouped" and config.device_of_expert is not None:
        devices = torch.tensor(config.device_of_expert[index])
        renumbered = torch.unique(devices, return_inverse=True)[1].to(device)
        tables |= {"device_E": renumbered, "max_devices": of_layer(config.max_devices, index)}
    return tables


def of_layer(value: Any, index: int) -> Any:
    """A field that is one value, or a list with one for every layer."""
    return value[index] if isinstance(value, list) else value
