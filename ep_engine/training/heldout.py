"""Held-out losses of a run, domain by domain, and the weights of domains that follow them."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from ep_engine.data.batches import heldout_batches
from ep_engine.data.blend import Blend, reference_losses, updated_weights
from ep_engine.ledger import Ledger
from ep_engine.model import Decoder
from ep_engine.pipeline import Pipeline
from ep_engine.resolve import Run
from ep_engine.training.evaluate import Evaluation, evaluate


class HeldOut:
    """Evaluations of one run. All ranks call the same.

    Args:
        run: from `resolve`.
        pipeline: its model.
        group: all ranks.
        dp: place and number of the ranks that share rows.
        sharing: ranks that have the same rows.
    """

    def __init__(
        self, run: Run, pipeline: Pipeline, group: dist.ProcessGroup, dp: tuple[int, int], sharing: int
    ) -> None:
        self._run, self._pipeline, self._group, self._dp, self._sharing = run, pipeline, group, dp, sharing
        self.last: dict[str, Any] = {}  # step and losses, for lines of metrics

    def midway(self, step: int, stages: Sequence[Decoder], ledger: Ledger, blend: Blend) -> None:
        """Between two steps, which must not notice: losses, and weights where they follow them."""
        with ledger.kept():
            found = self._evaluate()
        for module in (module for stage in stages for module in stage.modules()):
            if isinstance(module, FSDPModule):  # what stands whole for a forward pass would be saved as it is
                module.reshard()
        self.last = {"step": step, "loss": {name: one.loss for name, one in found.items()}}
        data = self._run.config.data
        if data.dynamic_weights is not None and data.reference_losses is not None:
            losses = np.array([found[name].loss for name in blend.names])
            aims = reference_losses(data.reference_losses, blend.names)
            blend.reweigh(updated_weights(data.dynamic_weights, blend.weights_D, losses, aims))

    def summary(self) -> tuple[dict[str, Any], float | None]:
        """What summary.json says, and the share of selections that are not plain top-k's."""
        found = self._evaluate()
        if not found:
            return {"heldout_loss": None}, None
        total = sum(one.num_tokens for one in found.values())
        loss = sum(one.loss * one.num_tokens for one in found.values()) / total
        told: dict[str, Any] = {"heldout_loss": loss, "heldout_tokens": total}
        if len(found) > 1:
            told["heldout_losses"] = {name: one.loss for name, one in found.items()}
        shares = [one.changed_share for one in found.values() if one.changed_share is not None]
        return told, statistics.fmean(shares) if shares else None

    def _evaluate(self) -> dict[str, Evaluation]:
        data, (rank, num_ranks) = self._run.config.data, self._dp
        found = {}
        for name, file in self._run.heldout.items():
            batches = heldout_batches(
                file,
                sequence_length=data.sequence_length,
                batch_size=data.batch_size,
                num_batches=data.heldout_batches,
                rank=rank,
                num_ranks=num_ranks,
                packing=data.packing,
            )
            layers = len(self._run.model.moe_layers())
            found[name] = evaluate(self._pipeline, batches, self._group, moe_layers=layers, sharing=self._sharing)
        return found
