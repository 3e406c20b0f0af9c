"""Watch: what a run learns of its routers while it trains, and the losses that keep their experts equally busy.

A loss is to be that of a whole batch, whose parts come one after the other. With every part it is computed of the sums
over all parts so far, of all ranks, scaled up to the whole (arXiv:2501.11873 does so for the load); its gradient is
taken for the part that is there. Each part adds its share, and with one part it is the loss of the batch.

Shape letters:  L MoE layers of the model   E experts of a layer, or the most that one has
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import ops
from ep_engine.balance_losses import BalanceLoss
from ep_engine.load_balance import RouterStatistics, standing_for, with_loss
from ep_engine.model_config import ModelConfig


class RouterWatch:
    """Counts of the tokens of this rank; layers that are elsewhere stay 0.

    Args:
        model: with experts or without.
        device: of the counts.
        stage: the ranks that share the batch and the layers.
        tp: those of them that share rows.
        losses: by name, with their coefficients; layers take their sums in this order.
        of_rank: losses of what this rank has in a part of a batch, as if it were the batch.
        num_parts: of a batch.
        num_rows: of a batch.
        counts_pairs: whether to count who works with whom.

    Attributes:
        experts_L: experts of every layer; beyond them a row of a table of the widest layer stays 0.
        load_LE: float32, tokens that chose each expert, since they were last `taken`, as all that follows.
        importance_LE: float32, sums of their probabilities.
        dropped_LE: float32, choices of them that they did not serve.
        tokens_L: float32, tokens.
        entropy_L: float32, sums over tokens of the entropy of their probabilities, in nats.
        losses: this rank's shares of the balance losses, summed over steps, by name.
        step_load_LE: float32, loads since the step began.
        pairs_LEE: int64, tokens that chose both experts; never set back.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        stage: dist.ProcessGroup,
        tp: dist.ProcessGroup,
        *,
        losses: Mapping[str, tuple[float, BalanceLoss]],
        of_rank: bool,
        num_parts: int,
        num_rows: int,
        counts_pairs: bool = True,
    ) -> None:
        self.layers, self.experts_L = model.moe_layers(), model.experts_of_layer()
        self.num_layers, experts = len(self.layers), max(self.experts_L, default=0)
        of_experts = torch.zeros(4, self.num_layers, experts, device=device)
        self.load_LE, self.importance_LE, self.dropped_LE, self.step_load_LE = of_experts
        self.tokens_L, self.entropy_L = torch.zeros(2, self.num_layers, device=device)
        # Made here: all ranks name the same losses, whatever layers they have.
        self.losses = {name: torch.zeros((), device=device) for name in losses}
        self.pairs_LEE = torch.zeros(self.num_layers, experts, experts, dtype=torch.int64, device=device)
        self.counts_pairs = counts_pairs
        self._kinds, self._stage, self._tp = dict(losses), stage, tp
        self._of_rank, self._num_parts, self._num_rows = of_rank, num_parts, num_rows
        self._parts: dict[int, int] = {}  # of this step, by the first layer of a stage
        self._so_far: dict[int, Tensor] = {}  # sums over them
        self._before: list[Tensor] = []  # all counts as the step began

    def begin_step(self, *, may_undo: bool = False) -> None:
        """Forget the parts of the batch before; `may_undo`: the step may be left out."""
        self._before = [one.clone() for one in (*self._sums(), self.pairs_LEE)] if may_undo else []
        self._parts.clear()
        self._so_far.clear()
        self.step_load_LE.zero_()

    def undo_step(self) -> None:
        """The step since `begin_step` does not count."""
        for one, before in zip((*self._sums(), self.pairs_LEE), self._before, strict=True):
            one.copy_(before)

    def taken(self, group: dist.ProcessGroup) -> list[Tensor]:
        """Loads, importances, dropped choices, tokens and entropies of all ranks of `group`, float64, and the losses in
        their order; what is here begins again from zero.
        """
        sums = [one.double() for one in self._sums()]
        self.forget()
        for summed in sums:
            dist.all_reduce(summed, group=group)
        return sums

    def forget(self) -> None:
        """Begin again from zero."""
        for one in self._sums():
            one.zero_()

    def _sums(self) -> list[Tensor]:
        own = self.load_LE, self.importance_LE, self.dropped_LE, self.tokens_L, self.entropy_L
        return [*own, *self.losses.values()]

    def __call__(self, x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
        """See `model.Watch`."""
        for layer, router in routers.items():
            self._count(layer, router)
            if self.counts_pairs:
                ops.count_pairs(router.ids_TK, self.pairs_LEE[layer])
        if not routers or not self._kinds:
            return x
        return with_loss(x, self._loss(routers))

    def _loss(self, routers: dict[int, RouterStatistics]) -> Tensor:
        """This part's share of all losses of the layers of a stage, times their coefficients."""
        tokens, totals = self._totals(routers)
        loss = tokens.new_zeros(())
        for number, (name, (coefficient, kind)) in enumerate(self._kinds.items()):
            over = self._num_rows if kind.of_rows else tokens
            values = torch.stack([kind.value(of_layer[number], torch.as_tensor(over)) for of_layer in totals])
            mean = values.sum() / self.num_layers
            share = mean.detach() / self._num_parts if not kind.of_rows else mean.detach()
            sharers = self._tp if kind.of_rows else self._stage
            self.losses[name] += share / dist.get_world_size(sharers)
            loss = loss + coefficient * mean
        return loss

    def _totals(self, routers: dict[int, RouterStatistics]) -> tuple[Tensor, list[list[Tensor]]]:
        """Tokens, and the sums of every layer and loss, of the batch as far as it is known."""
        kinds = [kind for _, kind in self._kinds.values()]
        local = [router.sums for router in routers.values()]
        flat = [sums for of_layer in local for sums, kind in zip(of_layer, kinds, strict=True) if not kind.of_rows]
        count = next(iter(routers.values())).num_tokens.float().view(1)
        known = self._of_batch(next(iter(routers)), torch.cat([count, *(sums.detach() for sums in flat)]))
        tokens, *rest = known.split([1, *(len(sums) for sums in flat)])
        whole = iter(rest)
        totals = []
        for of_layer in local:
            totals.append(
                [
                    standing_for(sums, self._of_rows(sums.detach()) if kind.of_rows else next(whole))
                    for sums, kind in zip(of_layer, kinds, strict=True)
                ]
            )
        return tokens[0], totals

    def _of_batch(self, first: int, sums: Tensor) -> Tensor:
        """Sums of a part of this rank -> an estimate of those of the batch of all ranks."""
        ranks = dist.get_world_size(self._stage)
        if self._of_rank:
            return sums * (ranks * self._num_parts)
        dist.all_reduce(sums, group=self._stage)
        self._parts[first] = self._parts.get(first, 0) + 1
        self._so_far[first] = sums = sums + self._so_far.get(first, 0)
        return sums * (self._num_parts / self._parts[first])

    def _of_rows(self, sums_BN: Tensor) -> Tensor:
        """Of rows that ranks of a tp group have a share of their positions of."""
        whole_BN = sums_BN.clone()
        dist.all_reduce(whole_BN, group=self._tp)
        return whole_BN

    @torch.no_grad()
    def _count(self, layer: int, router: RouterStatistics) -> None:
        width = self.experts_L[layer]
        self.load_LE[layer, :width] += router.load_E
        self.step_load_LE[layer, :width] += router.load_E
        self.importance_LE[layer, :width] += router.probability_E
        self.tokens_L[layer] += router.num_tokens
        self.entropy_L[layer] += router.entropy
        self.dropped_LE[layer, :width] += router.dropped_E
