"""The loss of next-token prediction, which keeps one tensor of the size of the logits and no more.

Shape letters:  T tokens   V vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

_ROWS = 512  # tokens at a time, so that what is in between stays in the caches


def entropy_sum(
    logits_BSV: Tensor, targets_BS: Tensor, *, masked: bool = False, of_tokens_BS: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropy over tokens, in float32; the logits are used up.

    `masked`: targets below 0 are left out. It is told and not looked for, which would cost a pass over the logits.
    `of_tokens_BS`: float32, contiguous; the loss of every token is written there, 0 where it is left out.

    Logits that are split along the vocabulary, and their backward, must be within torch's `loss_parallel`, which knows
    no nesting; those are kept.
    """
    logits_TV, targets_T = logits_BSV.flatten(0, 1), targets_BS.flatten()
    if isinstance(logits_TV, DTensor):
        loss = F.cross_entropy(logits_TV.float(), targets_T, reduction="sum" if of_tokens_BS is None else "none")
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        if of_tokens_BS is None:
            return loss
        of_tokens_BS.copy_(loss.detach().view_as(of_tokens_BS))
        return loss.sum()
    of_tokens_T = None if of_tokens_BS is None else of_tokens_BS.view(-1)
    of_all: Tensor = _EntropySum.apply(logits_TV, targets_T, masked, of_tokens_T)  # type: ignore[no-untyped-call]
    return of_all


class _EntropySum(torch.autograd.Function):
    """Forward leaves the gradient, softmax minus one at the target, where the logits were."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, masked: bool, of_tokens_T: Tensor | None) -> Tensor:
        total = torch.zeros((), device=logits_TV.device)
        parts = zip(logits_TV.split(_ROWS), targets_T.split(_ROWS), strict=True)
        for number, (rows_RV, targets_R) in enumerate(parts):
            left_out_R1, targets_R1 = (targets_R < 0).unsqueeze(1), targets_R.clamp(min=0).unsqueeze(1)
            log_RV = torch.log_softmax(rows_RV.float(), dim=1)
            likelihood_R1 = log_RV.gather(1, targets_R1).masked_fill_(left_out_R1, 0)
            total -= likelihood_R1.sum()
            if of_tokens_T is not None:
                torch.neg(likelihood_R1[:, 0], out=of_tokens_T[number * _ROWS : (number + 1) * _ROWS])
            grad_RV = log_RV.exp_()
            grad_RV.scatter_add_(1, targets_R1, -torch.ones_like(grad_RV[:, :1]))
            if masked:
                grad_RV.masked_fill_(left_out_R1, 0)
            rows_RV.copy_(grad_RV)
        ctx.grad_TV = logits_TV
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        assert ctx.grad_TV is not None, "its gradient can be taken once"
        grad_TV, ctx.grad_TV = ctx.grad_TV, None
        return grad_TV.mul_(grads[0]), None, None, None
