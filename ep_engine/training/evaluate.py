"""Evaluate: the loss on held-out text, and how the router behaved there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel

from ep_engine.data.batches import Batch
from ep_engine.entropy import entropy_sum
from ep_engine.load_balance import RouterStatistics
from ep_engine.pipeline import Pipeline


@dataclass(frozen=True)
class Evaluation:
    """Sums over the tokens of all ranks, turned into means."""

    loss: float  # nats per token
    num_tokens: int
    changed_share: float | None  # tokens per layer whose experts are not those of plain top-k; None: dense


@torch.no_grad()
def evaluate(
    pipeline: Pipeline,
    batches: Iterator[Batch],
    group: dist.ProcessGroup,
    *,
    moe_layers: int,
    sharing: int = 1,
) -> Evaluation:
    """Mean cross entropy over `batches`, this rank's rows of them; the same on every rank of `group`.

    Args:
        pipeline: the model.
        batches: this rank's rows.
        group: all ranks.
        moe_layers: layers with experts in the whole model.
        sharing: ranks that have the same rows, and split the vocabulary and the sequence.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=pipeline.device)  # loss, tokens, tokens * layers that changed

    def count_changed(x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        sums[2] += sum(changed_tokens(router) for router in routers.values())
        return x

    with pipeline.watched(count_changed), loss_parallel():
        for batch in (batch.to(pipeline.device) for batch in batches):
            logits_BSV = pipeline.forward(batch)
            if logits_BSV is not None:
                sums[0] += entropy_sum(logits_BSV, batch.targets_BS) / sharing
                sums[1] += (batch.targets_BS >= 0).sum() / sharing
    dist.all_reduce(sums, group=group)
    loss_sum, num_tokens, changed = sums.tolist()
    share = changed / max(num_tokens * moe_layers, 1) if moe_layers else None
    return Evaluation(loss_sum / max(num_tokens, 1), round(num_tokens), share)


def changed_tokens(router: RouterStatistics) -> Tensor:
    """Number of tokens whose set of experts is not that of plain top-k on the same logits."""
    top_k = router.ids_TK.shape[1]
    plain_TK = router.logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return (router.ids_TK.sort(dim=1).values != plain_TK.sort(dim=1).values).any(dim=1).sum()
