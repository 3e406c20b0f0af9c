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
        experts_L: experts of every layer; beyond them a row of a table of the widest layer stays 0.
        load_LE: float32, tokens that chose each expert, since they were last `taken`, as all that follows.
        importance_LE: float32, sums of their probabilities.
        tokens_L: float32, tokens.
        entropy_L: float32, sums over tokens of the entropy of their probabilities, in nats.
        dropped_L: float32, choices that no expert served; 0, because nothing here drops any.
        losses: this rank's shares of the balance losses, summed over steps, by name.
        pairs_LEE: int64, tokens that chose both experts; never set back.
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
        self.layers, self.experts_L = model.moe_layers(), model.experts_of_layer()
        self.num_layers, experts = len(self.layers), max(self.experts_L, default=0)
        self.load_LE, self.importance_LE = torch.zeros(2, self.num_layers, experts, device=device)
        self.tokens_L, self.entropy_L, self.dropped_L = torch.zeros(3, self.num_layers, device=device)
        # Made here: all ranks name the same losses, whatever layers they have.
        self.losses = {"load_balance": torch.zeros((), device=device)} if model.moe and coefficient else {}
        self.pairs_LEE = torch.zeros(self.num_layers, experts, experts, dtype=torch.int64, device=device)
        self._stage, self._coefficient, self._num_parts = stage, coefficient / num_parts, num_parts
        self._num_tokens, self._of_plain, self.counts_pairs = num_tokens, of_plain, counts_pairs

    def taken(self, group: dist.ProcessGroup) -> list[Tensor]:
        """Loads, importances, tokens, entropies and dropped choices of all ranks of `group`, float64, and the losses in
        their order; what is here begins again from zero.
        """
        own = (self.load_LE, self.importance_LE, self.tokens_L, self.entropy_L, self.dropped_L, *self.losses.values())
        sums = [one.double() for one in own]
        for one, summed in zip(own, sums, strict=True):
            one.zero_()
            dist.all_reduce(summed, group=group)
        return sums

    def __call__(self, x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        """See `model.Watch`."""
        for layer, router in routers.items():
            self._count(layer, router)
            if self.counts_pairs:
                ops.count_pairs(router.ids_TK, self.pairs_LEE[layer])
        if not routers or self._coefficient == 0:
            return x
        counted = [with_plain_load(router) if self._of_plain else router for router in routers.values()]
        balance = load_balance_loss(counted, self._num_tokens, self._stage, self.num_layers)
        self.losses["load_balance"] += balance.detach() / self._num_parts
        return with_loss(x, self._coefficient * balance)

    @torch.no_grad()
    def _count(self, layer: int, router: RouterStatistics) -> None:
        width = self.experts_L[layer]
        self.load_LE[layer, :width] += router.load_E
        self.importance_LE[layer, :width] += router.probability_E
        self.tokens_L[layer] += len(router.ids_TK)
        self.entropy_L[layer] += torch.special.entr(torch.softmax(router.logits_TE, dim=1)).sum()
