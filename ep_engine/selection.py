"""Selection: the rules by which a router chooses experts, each checked once and turned into tables.

The choosing itself is csrc/choose_experts.h. Column 0 of the ids is the top-1 expert, and of equal scores the lower id
wins. Ids are logical expert ids.

Shape letters:  T tokens of this rank   E experts   K top_k
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ep_engine import ops
from ep_engine.errors import UserError
from ep_engine.model_config import MoEConfig


class Rule:
    """Chooses K distinct experts per token."""

    def __init__(self, selection: ops.Selection) -> None:
        self._selection = selection
        self._top_t, self._max_groups = selection.top_t, selection.max_groups
        self._on: dict[torch.device, ops.Selection] = {}

    def tighten(self, done: float) -> None:
        """Allow all candidates and groups at `done` 0, those of the rule from 1 on, and linearly many between."""
        s, share = self._selection, min(max(done, 0.0), 1.0)
        all_t = 0 if s.lists_EN is None else s.lists_EN.shape[1]
        self._top_t = math.ceil(all_t + (s.top_t - all_t) * share)
        self._max_groups = math.ceil(s.num_groups + (s.max_groups - s.num_groups) * share)

    def on(self, device: torch.device) -> ops.Selection:
        """The rule with its tables on a device; moved once, because a copy to a GPU would wait for it."""
        if device not in self._on:
            moved: dict[str, Any] = {
                name: v.to(device) for name, v in self._selection._asdict().items() if isinstance(v, Tensor)
            }
            self._on[device] = self._selection._replace(**moved)
        return self._on[device]._replace(top_t=self._top_t, max_groups=self._max_groups)

    def may_follow(self, first_T: Tensor) -> Tensor | None:
        """(T, E) bool: the experts that may be among a token's, whose best one is `first_T`; None: all."""
        return None

    def select(self, scores_TE: Tensor) -> Tensor:
        """(T, E) float32, any order-preserving function of the logits -> (T, K) int64."""
        return ops.choose_experts(scores_TE, self.on(scores_TE.device))[0]


class TopK(Rule):
    """The K experts with the highest scores."""

    def __init__(self, top_k: int) -> None:
        super().__init__(ops.Selection(top_k))


class GroupLimited(Rule):
    """Experts of M of n equal groups with consecutive ids: those groups that have the best expert, arXiv:2405.04434.

    Args:
        top_k: K.
        num_experts: E.
        num_groups: n, divides E.
        topk_groups: M, in 1..n; M groups hold at least K experts.
    """

    def __init__(self, top_k: int, num_experts: int, num_groups: int, topk_groups: int) -> None:
        if num_experts % num_groups or not 1 <= topk_groups <= num_groups:
            raise UserError(
                f"routing.num_groups ({num_groups}) must divide {num_experts} experts and routing.max_devices "
                f"({topk_groups}) must be in 1..{num_groups}; correct them"
            )
        if topk_groups * (num_experts // num_groups) < top_k:
            raise UserError(
                f"routing.max_devices ({topk_groups}) groups of {num_experts // num_groups} experts hold fewer than "
                f"top_k ({top_k}); allow more"
            )
        super().__init__(ops.Selection(top_k, "group_limited", num_groups=num_groups, max_groups=topk_groups))


class C2R(Rule):
    """Collaboration-constrained routing, arXiv:2504.01337: partners of the top-1 expert are its close collaborators.

    Args:
        top_k: K.
        lists: (E, n) rows of expert ids, closest collaborator of expert i first in row i; i itself, if there, last.
        top_t: T, how many of a row are candidates, in K-1..E-1; None: all but i itself.

    Raises:
        UserError: T outside K-1..E-1, or longer than the lists; a row that names an expert twice, one that is not
            there, or the row's own among the first T.
    """

    def __init__(self, top_k: int, lists: Sequence[Sequence[int]] | Tensor, top_t: int | None = None) -> None:
        table_EN, top_t = _checked_lists(top_k, lists, top_t)
        super().__init__(ops.Selection(top_k, "c2r", lists_EN=table_EN, top_t=top_t))

    def may_follow(self, first_T: Tensor) -> Tensor:
        """See `Rule`: the first T of the list of the best expert, and itself."""
        lists_EN = self.on(first_T.device).lists_EN
        assert lists_EN is not None, "it was made of them"
        open_TE = torch.zeros(len(first_T), len(lists_EN), dtype=torch.bool, device=first_T.device)
        return open_TE.scatter(1, lists_EN[first_T, : self._top_t].long(), True).scatter(1, first_T[:, None], True)


class C2RGrouped(Rule):
    """C2R on at most M devices per token, which is guaranteed.

    The devices are the first M distinct ones met in score order, the top-1 expert's among them. Candidates are the
    first T collaborators that live there; if fewer than K-1 remain, the list is followed further, inside them.

    Args:
        top_k: K.
        lists: (E, E) or (E, E - 1), as of C2R: a row names all other experts.
        device_of_expert: [E], ids of any kind.
        max_devices: M.
        top_t: T, as of C2R.

    Raises:
        UserError: M devices may hold fewer than K experts, or lists do not name all other experts.
    """

    def __init__(
        self,
        top_k: int,
        lists: Sequence[Sequence[int]] | Tensor,
        device_of_expert: Sequence[int] | Tensor,
        max_devices: int = 1,
        top_t: int | None = None,
    ) -> None:
        table_EN, top_t = _checked_lists(top_k, lists, top_t)
        num_experts = len(table_EN)
        device_E = torch.as_tensor(device_of_expert, device="cpu").unique(return_inverse=True)[1]
        if table_EN.shape[1] < num_experts - 1 or len(device_E) != num_experts:
            raise UserError(
                f"c2r_grouped needs lists of {num_experts - 1} and devices of {num_experts} experts, got "
                f"{table_EN.shape[1]} and {len(device_E)}; make both from a profile of this model"
            )
        sizes = device_E.bincount().sort().values
        smallest = sizes[:max_devices].sum().item()
        if smallest < top_k:
            raise UserError(
                f"routing.max_devices ({max_devices}) devices may hold only {smallest} experts, fewer than top_k "
                f"({top_k}); allow more devices per token"
            )
        super().__init__(
            ops.Selection(
                top_k,
                "c2r_grouped",
                lists_EN=table_EN,
                group_of_E=device_E.int(),
                top_t=top_t,
                num_groups=len(sizes),
                max_groups=min(max_devices, len(sizes)),
            )
        )


def make_rule(moe: MoEConfig, layer: int) -> Rule:
    """The selection rule of one layer of a model."""
    routing = moe.routing
    top_t, max_devices = routing.in_layer(layer)
    if routing.rule == "topk":
        return TopK(moe.top_k)
    if routing.rule == "group_limited":
        assert routing.num_groups is not None and max_devices is not None, "MoEConfig checks that both are there"  # noqa: PT018
        return GroupLimited(moe.top_k, moe.num_experts, routing.num_groups, max_devices)
    assert routing.lists is not None, "MoEConfig checks that the tables are there"
    if routing.rule == "c2r":
        return C2R(moe.top_k, routing.lists[layer], top_t)
    assert routing.device_of_expert is not None, "MoEConfig checks that the tables are there"
    assert max_devices is not None, "MoEConfig checks that the tables are there"
    devices = routing.device_of_expert[layer]
    return C2RGrouped(moe.top_k, routing.lists[layer], devices, max_devices, top_t)


def _checked_lists(top_k: int, lists: Sequence[Sequence[int]] | Tensor, top_t: int | None) -> tuple[Tensor, int]:
    """The lists without the expert itself, int32, and T."""
    # On the CPU also inside a `torch.device("meta")` block: tables are values, not weights.
    table_EN = torch.as_tensor(lists, dtype=torch.int64, device="cpu")
    num_experts, length = table_EN.shape
    top_t = min(length, num_experts - 1) if top_t is None else top_t
    if not top_k - 1 <= top_t <= min(num_experts - 1, length):
        raise UserError(
            f"routing.top_t ({top_t}) must be in k-1..E-1 = {top_k - 1}..{num_experts - 1} and lists of "
            f"{length} must be as long; choose it there"
        )
    _check_lists(table_EN, top_t)
    return table_EN[:, : num_experts - 1].int().contiguous(), top_t


def _check_lists(table_EN: Tensor, top_t: int) -> None:
    num_experts = len(table_EN)
    for expert, row in enumerate(table_EN.tolist()):
        if len(set(row)) < len(row) or not set(row) <= set(range(num_experts)) or expert in row[:top_t]:
            raise UserError(
                f"collaboration list of expert {expert} must name others of the {num_experts} experts, each once, got "
                f"{row[:8]}{'...' if len(row) > 8 else ''}; write it again with `ep-engine profile`"
            )
