"""Pipeline: how the parts of a batch run through the stages, on torch.distributed.pipelining where there are several.

All tensors between stages have shapes that are known beforehand: torch would otherwise run the first part an extra time
to find them out, which moves the ledger and the statistics.

Shape letters:  B rows of a part   S positions   D model dim   V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from ep_engine.data.batches import Batch
from ep_engine.errors import Fault
from ep_engine.mesh import Meshes
from ep_engine.model import Decoder, Watch
from ep_engine.stages import Schedule, Stages
from ep_engine.stopwatch import part, timed

_SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}
Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """The stages of this rank, between those of its fellows.

    Args:
        models: of this rank, ascending.
        layout: of all stages.
        meshes: the ranks.
        schedule: the order of forwards and backwards; not read where there is one stage.
        part_shape: (B, S) of a part of a batch of training.
        num_parts: parts of a batch.
        dtype: of hidden states.
        separate_documents: whether a token sees only its own document.
        loss: of logits (B, S, V) and targets (B, S), within `loss_parallel`; its sum over parts and ranks is minimised.
    """

    def __init__(
        self,
        models: Sequence[Decoder],
        layout: Stages,
        meshes: Meshes,
        schedule: Schedule,
        *,
        part_shape: tuple[int, int],
        num_parts: int,
        dtype: torch.dtype,
        separate_documents: bool,
        loss: Loss,
    ) -> None:
        mesh = meshes.dense["pp"]
        self.layout, self.group, self.ends, self.loss = layout, mesh.get_group(), meshes.ends, loss
        self.models = dict(zip(layout.on(mesh.get_local_rank()), models, strict=True))
        self.separate_documents = separate_documents
        self.dtype, self.sequence_parts = dtype, meshes.dense["tp"].size()
        self.sequence_part = meshes.dense["tp"].get_local_rank()
        self.device = next(models[0].parameters()).device
        self._schedule = self._make_schedule(schedule, part_shape, num_parts) if layout.last > 0 else None

    def train(self, parts: Sequence[Batch], numbers: Sequence[Tensor] | None = None) -> Tensor:
        """Forward and backward of the parts of a batch, which are on the device.

        Gradients are summed over ranks once, after the last part.

        Args:
            parts: of the batch, this rank's rows.
            numbers: int64 (B, S) for each: numbers of their tokens in the run, see `Router`.

        Returns:
            This rank's share of the loss; 0 where the last stage is elsewhere.
        """
        routed = None if numbers is None else [self._own_positions(one) for one in numbers]
        if self._schedule is None:
            with loss_parallel():
                return self._one_after_the_other(parts, routed)
        losses: list[Tensor] = []
        inputs, targets, documents = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        given: dict[str, Any] = {"documents_BS": documents} if self.separate_documents else {}
        if routed is not None:
            given["numbers_BS"] = torch.cat(routed)
        if self.layout.last in self.models:
            given |= {"target": targets, "losses": losses}
        with _plain_faults(), loss_parallel(), part("waiting"):  # but for what the stages do
            self._schedule.step(*((inputs,) if 0 in self.models else ()), **given, return_outputs=False)
        self._sum_tied()
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.device)

    def forward(self, batch: Batch) -> Tensor | None:
        """Logits (B, S, V) on the ranks of the last stage, None on the others; without gradients."""
        x, documents_BS = batch.inputs_BS, self._documents(batch)
        for number, model in self.models.items():
            if number > 0 and number - 1 not in self.models:
                x = torch.empty(self._hidden_shape(batch.inputs_BS.shape), dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=self.layout.rank_of_stage[number - 1])
            x = model(x, documents_BS)
            if number < self.layout.last and number + 1 not in self.models:
                dist.send(x.contiguous(), group=self.group, group_dst=self.layout.rank_of_stage[number + 1])
        return x if self.layout.last in self.models else None

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Within the block another watch sees the routers."""
        before = [model.watch for model in self.models.values()]
        for model in self.models.values():
            model.watch = watch
        try:
            yield
        finally:
            for model, old in zip(self.models.values(), before, strict=True):
                model.watch = old

    def _documents(self, batch: Batch) -> Tensor | None:
        return batch.documents_BS if self.separate_documents else None

    def _own_positions(self, numbers_BS: Tensor) -> Tensor:
        """Of all positions of a row those that a rank routes."""
        return numbers_BS.chunk(self.sequence_parts, dim=1)[self.sequence_part].contiguous()

    def _one_after_the_other(self, parts: Sequence[Batch], numbers: Sequence[Tensor] | None) -> Tensor:
        model, losses = self.models[0], []
        for i, batch in enumerate(parts):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == len(parts) - 1)
            of_part = None if numbers is None else numbers[i]
            loss = self.loss(model(batch.inputs_BS, self._documents(batch), of_part), batch.targets_BS)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _sum_tied(self) -> None:
        """The head of the last stage is the embedding of the first: both take the sum of the two gradients."""
        for model in self.models.values():
            if model.config.tie_embeddings and (model.is_first or model.is_last):
                assert model.embed is not None, "both have it"
                if not model.embed.weight.requires_grad:
                    continue
                grad = model.embed.weight.grad
                assert grad is not None, "both are after their backward"
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=self.ends)

    def _make_schedule(self, name: Schedule, part_shape: tuple[int, int], num_parts: int) -> Any:
        stages = [self._stage(number, model, part_shape) for number, model in self.models.items()]
        for model in self.models.values():
            for moe in model.moe_layers().values():
                moe.experts.weight_grads_later = name == "zbv"
        one_stage = name in ("gpipe", "1f1b")
        # The loss is divided by all tokens, so gradients are not to be divided by the parts.
        return _SCHEDULES[name](
            stages[0] if one_stage else stages, num_parts, loss_fn=timed("other")(self.loss), scale_grads=False
        )

    def _stage(self, number: int, model: Decoder, part_shape: tuple[int, int]) -> PipelineStage:
        tokens = torch.empty(part_shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(self._hidden_shape(part_shape), dtype=self.dtype, device="meta", requires_grad=True)
        logits = hidden.new_empty((*part_shape, model.config.vocab_size), requires_grad=True)
        return _Stage(
            model,
            number,
            self.layout.last + 1,
            self.device,
            input_args=tokens if number == 0 else hidden,
            output_args=logits if number == self.layout.last else hidden,
            group=self.group,
        )

    def _hidden_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        rows, positions = shape
        return rows, positions // self.sequence_parts, next(iter(self.models.values())).config.hidden_size


class _Stage(PipelineStage):
    """A stage whose own work can be told from waiting for the others."""

    forward_one_chunk = timed("other")(PipelineStage.forward_one_chunk)
    backward_one_chunk = timed("other")(PipelineStage.backward_one_chunk)
    backward_weight_one_chunk = timed("other")(PipelineStage.backward_weight_one_chunk)


@contextmanager
def _plain_faults() -> Iterator[None]:
    """Raise what went wrong in a stage, without the pages of text that the schedule puts around it."""
    try:
        yield
    except Fault:
        raise
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
            if isinstance(cause, Fault):
                break
        raise cause from None
