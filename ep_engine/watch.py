"""Watch: what a run learns of its routers while it trains, and the loss that keeps their experts equally busy.

Shape letters:  L MoE layers of the model   E experts of a layer, or the most that one has
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import ops
from ep_engine.load_balance import RouterStatistics, load_balance_loss, with_loss, with_plain_load
from ep_engine.model_config import ModelConfig


class RouterWatch:
    """Counts of the tokens of this rank; layers that are elsewhere stay 0.

    Args:
        model: with experts or without.
        device: of the counts.
        stage: the ranks that share the batch and the layers.
        coefficient: of the load-balance loss.
        of_plain: count in it the choices of plain top-k on the same scores instead of those of the rule in force.
        num_tokens: of one part of a batch, on all ranks.
        num_parts: parts of a batch, over which the loss is the mean.
        counts_pairs: whether to count who works with whom.

    Attributes:
        load_LE: float32, tokens that chose each expert, since it was last set to 0.
        pairs_LEE: int64, tokens that chose both experts.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        stage: dist.ProcessGroup,
        *,
        coefficient: float,
        of_plain: bool = False,
        num_tokens: int,
        num_parts: int,
        counts_pairs: bool = True,
    ) -> None:
        self.experts_of_layer = model.experts_of_layer()
        self.num_layers, experts = len(self.experts_of_layer), max(self.experts_of_layer, default=0)
        self.load_LE = torch.zeros(self.num_layers, experts, device=device)
        self.pairs_LEE = torch.zeros(self.num_layers, experts, experts, dtype=torch.int64, device=device)
        self._stage, self._coefficient = stage, coefficient / num_parts
        self._num_tokens, self._of_plain, self.counts_pairs = num_tokens, of_plain, counts_pairs

    def __call__(self, x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        """See `model.Watch`."""
        for layer, router in routers.items():
            self.load_LE[layer, : len(router.load_E)] += router.load_E
            if self.counts_pairs:
                ops.count_pairs(router.ids_TK, self.pairs_LEE[layer])
        if not routers or self._coefficient == 0:
            return x
        counted = [with_plain_load(router) if self._of_plain else router for router in routers.values()]
        balance = load_balance_loss(counted, self._num_tokens, self._stage, self.num_layers)
        return with_loss(x, self._coefficient * balance)
