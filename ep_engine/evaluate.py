"""Evaluate: the loss on held-out text, and how the router behaved there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from ep_engine.load_balance import RouterStatistics
from ep_engine.model import Decoder


@dataclass(frozen=True)
class Evaluation:
    """Sums over the tokens of all ranks, turned into means."""

    loss: float  # nats per token
    num_tokens: int
    changed_share: float | None  # tokens per layer whose experts are not those of plain top-k; None: dense


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterator[tuple[Tensor, Tensor]],
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    sharing: int = 1,
) -> Evaluation:
    """Mean cross entropy over `batches`, this rank's rows of them; the same on every rank of `group`.

    `sharing` ranks have the same rows, and split the vocabulary and the sequence.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tokens, tokens * layers that changed
    num_layers = 0
    for inputs_BS, targets_BS in batches:
        output = model(inputs_BS.to(device))
        sums[0] += entropy_sum(output.logits, targets_BS.to(device)) / sharing
        sums[1] += targets_BS.numel() / sharing
        sums[2] += sum(changed_tokens(router) for router in output.routers)
        num_layers = len(output.routers)
    model.train()
    dist.all_reduce(sums, group=group)
    loss_sum, num_tokens, changed = sums.tolist()
    share = changed / (num_tokens * num_layers) if num_layers else None
    return Evaluation(loss_sum / num_tokens, round(num_tokens), share)


def entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of the cross entropy over tokens, in float32; logits may be split along the vocabulary.

    Its backward must be within torch's `loss_parallel` then.
    """
    with loss_parallel():
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="sum")
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def changed_tokens(router: RouterStatistics) -> Tensor:
    """Number of tokens whose set of experts is not that of plain top-k on the same logits."""
    top_k = router.ids_TK.shape[1]
    plain_TK = router.logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return (router.ids_TK.sort(dim=1).values != plain_TK.sort(dim=1).values).any(dim=1).sum()
