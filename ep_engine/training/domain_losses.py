"""Losses of the tokens that a run learns, domain by domain, between two lines of metrics.

Shape letters:  B rows of this rank in a part of a batch   S positions   R rows of all parts   D domains
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.entropy import entropy_sum


class DomainLosses:
    """Sums of one rank. With one domain the loss of the run says all, and nothing is kept.

    Args:
        num_domains: D.
        device: of the logits.
        group: all ranks.
        sharing: ranks that have the same rows.
    """

    def __init__(self, num_domains: int, device: torch.device, group: dist.ProcessGroup, sharing: int) -> None:
        self._wanted, self._group, self._sharing = num_domains > 1, group, sharing
        self._sums_D2 = torch.zeros(num_domains, 2, dtype=torch.float64, device=device)  # loss, tokens
        self._of_rows: list[Tensor] = []  # (B, 2) of a part of a batch

    def begin_step(self) -> None:
        """Forget the rows of a batch that did not count."""
        self._of_rows.clear()

    def entropy_sum(self, logits_BSV: Tensor, targets_BS: Tensor, *, masked: bool) -> Tensor:
        """See `entropy.entropy_sum`; every part of a batch, in their order, which pipelines keep as well."""
        if not self._wanted:
            return entropy_sum(logits_BSV, targets_BS, masked=masked)
        of_tokens_BS = torch.empty(targets_BS.shape, device=targets_BS.device)
        total = entropy_sum(logits_BSV, targets_BS, masked=masked, of_tokens_BS=of_tokens_BS)
        tokens_B = (targets_BS >= 0).sum(dim=1)
        self._of_rows.append(torch.stack((of_tokens_BS.double().sum(dim=1), tokens_B.double()), dim=1))
        return total

    def count(self, domains: Sequence[int]) -> None:
        """Add the rows since `begin_step`, whose domains these are; none of them is here if the last stage is not."""
        if self._of_rows:
            rows_R2 = torch.cat(self._of_rows)
            self._sums_D2.index_add_(0, torch.tensor(domains, device=rows_R2.device), rows_R2)

    def forget(self) -> None:
        """Begin again from zero."""
        self._sums_D2.zero_()

    def taken(self) -> list[float | None]:
        """Nats per token of every domain since they were last taken, on all ranks; None of one that was not read."""
        if not self._wanted:
            return []
        sums_D2 = self._sums_D2 / self._sharing
        self.forget()
        dist.all_reduce(sums_D2, group=self._group)
        return [loss / tokens if tokens else None for loss, tokens in sums_D2.tolist()]
