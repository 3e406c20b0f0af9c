"""Capacity: an expert serves at most so many tokens of a pass; those that come later are dropped (arXiv:2101.03961).

Shape letters:  T tokens of this rank   K top_k   E experts   P ranks
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Capacity:
    """Of the layers of one rank.

    Tokens are served in the order of the ranks, and on a rank in their own; so with data parallelism alone it is that
    of the batch, whatever the number of ranks.

    Args:
        factor: times the mean number of tokens of an expert.
        group: the ranks whose tokens share the experts; None: only this one.
    """

    def __init__(self, factor: float, group: dist.ProcessGroup | None) -> None:
        self.factor, self.group = factor, group

    def __call__(self, ids_TK: Tensor, num_experts: int, counts_T: Tensor) -> Tensor:
        """(T, K) bool: whether a choice is served; one of a token that does not count never is.

        All ranks of the group call this together.
        """
        ids_TK = ids_TK.masked_fill(~counts_T[:, None], num_experts)  # padding stands behind all experts
        flat, ones = ids_TK.reshape(-1), torch.ones(ids_TK.numel(), dtype=torch.int64, device=ids_TK.device)
        own_E = ones.new_zeros(num_experts + 1).scatter_add(0, flat, ones)  # bincount would wait for a GPU
        of_ranks_PE = self._of_ranks(own_E)
        before_E = of_ranks_PE[: self._rank()].sum(dim=0)
        most = torch.ceil(of_ranks_PE[:, :-1].sum() * (self.factor / num_experts))
        order = flat.argsort(stable=True)
        firsts_E = own_E.cumsum(dim=0) - own_E
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - firsts_E.repeat_interleave(
            own_E, output_size=len(order)
        )
        return (place.view_as(ids_TK) + before_E[ids_TK] < most) & (ids_TK < num_experts)

    def _of_ranks(self, own_E: Tensor) -> Tensor:
        if self.group is None:
            return own_E[None]
        found = [torch.empty_like(own_E) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own_E, group=self.group)
        return torch.stack(found)

    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)
