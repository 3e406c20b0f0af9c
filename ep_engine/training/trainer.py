"""Train: the loop over steps, and what a run leaves in its folder.

FOLDER/run.toml                  what was asked, with the layout and the versions as comments
FOLDER/job                       torchrun's id of the job, by which ranks that are started again know the folder
FOLDER/metrics.jsonl             a line every `train.log_every` steps, and before a save
FOLDER/checkpoints/step_000100   engine checkpoints with the optimiser's moments
FOLDER/profile.npz               who worked with whom between the last two saves, for `ep-engine place`
FOLDER/tensorboard               the numbers of metrics.jsonl
FOLDER/run.lock                  held while the run lives
FOLDER/summary.json              written last: the figures of the run since `first_step`

A resumed run writes run.from-STEP.toml beside run.toml, and drops the metrics of the steps that it does again.
"""

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine import checkpoint, debug, job, run_folder, stopwatch
from ep_engine.c2r.placement_watch import PlacementWatch, stored_profile
from ep_engine.config import RunConfig, to_toml
from ep_engine.errors import Fault, UserError
from ep_engine.initial import initialise
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.metrics import Metrics
from ep_engine.model_config import read_model_config
from ep_engine.output import whole_file
from ep_engine.parallelize import build, entries_of
from ep_engine.pipeline import Pipeline
from ep_engine.resolve import Run
from ep_engine.training.agreement import check_agreement
from ep_engine.training.balancing import balance, move_biases, needs_numbers
from ep_engine.training.domain_losses import DomainLosses
from ep_engine.training.feed import Feed
from ep_engine.training.guard import GO_BACK, Guard
from ep_engine.training.heldout import HeldOut
from ep_engine.training.mfu import flops_of_token, peak_of
from ep_engine.training.optimizer import (
    clip_gradients,
    make_optimizer,
    moment_entries,
    set_learning_rate,
    set_step,
    sum_over_ranks,
)
from ep_engine.training.routing_metrics import RoutingMetrics
from ep_engine.training.saver import Saver
from ep_engine.training.schedule import learning_rate
from ep_engine.training.stopping import Stopping
from ep_engine.training.trained import freeze_weights
from ep_engine.training.watch import RouterWatch
from ep_engine.transports.transport import lost_peer

# What gloo, NCCL and torch.distributed say when a peer is gone or silent.
_BACKENDS = re.compile(r"gloo|nccl|ProcessGroup|Connection (closed|reset)|Timed out waiting", re.IGNORECASE)


_log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]


def train(run: Run, world: World, report: Report = lambda _: None) -> dict[str, Any]:
    """Train and return what stands in summary.json; every rank of the job calls this.

    Args:
        run: from `resolve`.
        world: this process and its fellows.
        report: called on rank 0 with every line of metrics.jsonl.

    Raises:
        UserError: another run has taken the folder since `resolve` looked.
        Fault: the loss is not a number (the last checkpoint stays), a rank is gone, or the disk is full.
    """
    torch.manual_seed(run.config.train.seed)
    parallel = run.config.parallel
    device = world.pick_device(parallel.device)
    groups = process_groups(
        world,
        device,
        parallel.expert_parallel_size,
        parallel.timeout_s,
        tp_size=parallel.tensor_parallel_size,
        etp_size=parallel.expert_tensor_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        settings=run.settings(),
    )
    with groups as meshes:
        trainer = Trainer(run, meshes, device)
        with trainer.stopping, trainer.folder_opened(), trainer.saver:
            summary = trainer.run_steps(report if world.rank == 0 else lambda _: None)
        dist.barrier()
        return summary


@dataclass
class _Window:
    """What happened since the last line of metrics."""

    started: float = field(default_factory=time.perf_counter)
    losses: list[float] = field(default_factory=list)  # of steps that were not left out
    tokens: int = 0


class Trainer:
    """One run on one rank."""

    def __init__(self, run: Run, meshes: Meshes, device: torch.device) -> None:
        self.run, self.device, self.meshes = run, device, meshes
        self.config: RunConfig = run.config
        self.group: dist.ProcessGroup = meshes.world
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.dp_rank, self.dp_size, self.tp_size = (
            meshes.dense["dp"].get_local_rank(),
            meshes.dense["dp"].size(),
            meshes.dense["tp"].size(),
        )
        self.experts = meshes.experts
        data, train = self.config.data, self.config.train
        rows = data.batch_size // train.micro_batches  # of a part of a batch
        self.tokens_per_step = self.tokens = self.targets = data.batch_size * data.sequence_length
        self.feed = Feed(run, meshes, device)
        self.stopping = Stopping(train.time_limit_s)
        self.guard, self.last_norm = Guard(train), 0.0
        dtype: torch.dtype = getattr(torch, train.dtype)
        self.stages, self.ledger = build(
            run.model,
            run.placement,
            meshes,
            device=device,
            dtype=dtype,
            travel=self.config.moe,
            reshard_after_forward=self.config.parallel.reshard_after_forward,
            tokens=rows * data.sequence_length // meshes.stage.size(),
            stages=run.stages,
        )
        together = meshes.stage.get_group()
        padded = data.packing != "stream"
        losses = balance(self.stages, self.config.balance, seed=train.seed, has_padding=padded, stage=together)
        self.numbered = padded or needs_numbers(self.config.balance)
        self.watch = RouterWatch(
            run.model,
            device,
            together,
            meshes.dense["tp"].get_group(),
            losses=losses,
            of_rank=self.config.balance.over == "rank",
            num_parts=train.micro_batches,
            num_rows=data.batch_size,
            counts_pairs=self.config.output.watch,
        )
        self.domain_losses = DomainLosses(len(self.feed.blend.names), device, self.group, self.tp_size)
        for stage in self.stages:
            stage.recompute(train.recompute)
            stage.watch = self.watch
        self.pipeline = Pipeline(
            self.stages,
            run.stages,
            meshes,
            self.config.parallel.pipeline_schedule,
            part_shape=(rows // self.dp_size, data.sequence_length),
            num_parts=train.micro_batches,
            dtype=dtype,
            separate_documents=data.keeps_documents_apart,
            # Sums divided by the targets of all ranks: the gradients of all ranks then only have to be added.
            loss=self._loss,
        )
        dp = self.dp_rank, self.dp_size
        self.heldout = HeldOut(run, self.pipeline, self.group, dp, self.tp_size)
        freeze_weights(self.stages, train.trainable, train.freeze)
        self.optimizer = make_optimizer(self.stages, train)
        self.step = self.first_step = self._looked_at = self._load()
        self.routing, self.placement_watch = self._watch_routing()
        output = self.config.output
        self.metrics = Metrics(output.folder, output.wandb) if self.rank == 0 else None
        self.stopwatch: stopwatch.Stopwatch | None = None  # of the last step, if it was timed
        self.speeds: list[float] = []
        self.saver = Saver(
            self.config.output.folder,
            run.model,
            data.tokenizer or run.checkpoint,
            meshes.saving,
            meshes.timeout_s,
            keep=self.config.output.keep_checkpoints,
            background=self.config.output.async_save,
        )

    def _loss(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        return self.domain_losses.entropy_sum(logits_BSV, targets_BS, masked=self.feed.blend.masked) / self.targets

    def _load(self) -> int:
        """Fill the weights, and the moments of a resumed run; returns the step to go on from."""
        if self.run.checkpoint is None:
            weights = entries_of(self.stages, experts=self.experts)
            initialise(weights, self.run.model, self.config.train.seed)
            return 0
        return self._load_from(self.run.checkpoint, moments=self.run.resume is not None)

    def _load_from(self, folder: Path, *, moments: bool) -> int:
        """Fill the weights from a checkpoint, and the moments; returns the step to go on from."""
        weights = entries_of(self.stages, experts=self.experts)
        stored = read_model_config(folder / "model.json").moe
        if stored is not None and not stored.selection_bias:  # the run begins to move one
            for name in [name for name in weights if name.endswith(".router.bias")]:
                weights.pop(name).tensor.zero_()
        beside = moment_entries(self.stages, self.optimizer, experts=self.experts) if moments else {}
        kept = checkpoint.load(folder, {**weights, **beside}, group=self.group)
        step: int = kept["step"] if moments else 0
        set_step(self.optimizer, step)
        return step

    def run_steps(self, report: Report) -> dict[str, Any]:
        """All steps that are left, the last evaluation and the summary."""
        folder, train = self.config.output.folder, self.config.train
        window = _Window()
        while not self._is_over():
            with self._peers_watched(f"step {self.step + 1}"):
                loss = self._timed_step()
                window.tokens += self.tokens
                self.saver.poll(self.group)
                window.losses += [] if loss is None else [loss]
                if loss is not None and self.guard.is_spike(loss) and self._go_back(loss):
                    window = _Window()
                    continue
            if self.config.data.heldout_every and self.step % self.config.data.heldout_every == 0:
                before = time.perf_counter()
                with self._peers_watched(f"the evaluation at step {self.step}"):
                    self._tighten(1.0)  # the rule that is in the checkpoint
                    self.heldout.midway(self.step, self.stages, self.ledger, self.feed.blend)
                window.started += time.perf_counter() - before
            saving = self._is_over() or (train.save_every is not None and self.step % train.save_every == 0)
            if saving or self.step % train.log_every == 0:  # a run that goes on from here has all lines before
                with self._peers_watched(f"the metrics of step {self.step}"):
                    if debug.wanted():
                        self.check_agreement()
                    line = self._metrics(window)
                if self.metrics is not None:
                    self.metrics.append(line)
                report(line)
                window = _Window()
            if saving:
                before = time.perf_counter()
                with self._peers_watched(f"the save at step {self.step}"):
                    self._save()
                    self._look_at_placement()
                window.started += time.perf_counter() - before  # a save is no training
        with self._peers_watched("the evaluation"):
            summary = self._summary()
        with self._peers_watched(f"the save at step {self.step}"):
            self.saver.wait()
        summary["save_seconds"] = self.saver.blocked_s
        if self.metrics is not None:
            self.metrics.close()
            with whole_file(folder / "summary.json") as beside:
                beside.write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    def check_agreement(self) -> None:
        """See agreement.py."""
        entries = entries_of(self.stages, experts=self.experts)
        moments = moment_entries(self.stages, self.optimizer, experts=self.experts)
        check_agreement(self.stages, entries | moments, self.feed.part(0, self.step), self.meshes, self.step)

    @contextmanager
    def _peers_watched(self, where: str) -> Iterator[None]:
        """Turn a collective that failed outside of the MoE layers, which watch their own, into a Fault."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, Fault) or not _BACKENDS.search(str(error)):
                raise
            raise lost_peer(error, self.group, "world", where) from error

    def _timed_step(self) -> float | None:
        """One step; of the last before a line of metrics it is known where its time went."""
        if (self.step + 1) % self.config.train.log_every and self.step + 1 < self.config.train.steps:
            return self.one_step()
        with stopwatch.running(self.device) as self.stopwatch:
            return self.one_step()

    def one_step(self) -> float | None:
        """One step of the optimiser; returns the loss of the batch, None if it was left out."""
        tighten_steps = self.config.routing.tighten_steps
        self._tighten(self.step / tighten_steps if tighten_steps else 1.0)
        self.watch.begin_step(may_undo=self.config.train.skip_steps > 0)
        self.domain_losses.begin_step()
        parts = self.feed.parts(self.step)
        self.tokens, self.targets = self.feed.counts(parts)
        share = self.pipeline.train(parts, self.feed.numbers(parts, self.step) if self.numbered else None)
        # Ranks of a tp group have the same loss.
        total, norm, wanted = sum_over_ranks(share / self.tp_size, self.stages, self.group, self.stopping.wanted())
        self.stopping.agree(wanted)
        counts = math.isfinite(total) and math.isfinite(norm)
        with stopwatch.part("optimiser"):
            if counts:
                self._update(norm)
            elif not self.guard.may_skip():
                self._give_up(f"the loss is {total} and the gradient norm {norm}; training stopped")
            else:
                self.watch.undo_step()
                if self.rank == 0:
                    words = "step %d is left out: the loss is %s, the gradient norm %s"
                    _log.warning(words, self.step + 1, total, norm)
            self.optimizer.zero_grad()
        self.step += 1
        self.feed.advance(self.step)
        return total if counts else None

    def _update(self, norm: float) -> None:
        train, bias_rate = self.config.train, self.config.balance.bias_rate
        self.guard.counted()
        self.domain_losses.count(self.feed.domains())
        clip_gradients(self.stages, norm, train.clip_grad_norm)
        set_learning_rate(self.optimizer, learning_rate(train, self.step, self.tokens_per_step))
        self.optimizer.step()
        if bias_rate:
            move_biases(self.stages, self.watch.step_load_LE, bias_rate, self.meshes.stage.get_group())
        self.last_norm = norm

    def _give_up(self, what: str) -> NoReturn:
        self.saver.wait()
        kept = self.saver.last or self.run.resume
        last = f"the last checkpoint is {kept}" if kept else "no checkpoint was written yet"
        raise Fault(f"step {self.step + 1}: {what}, {last}, lower train.learning_rate", everywhere=True)

    def _go_back(self, loss: float) -> bool:
        """To the last checkpoint, with the data that come after; False if there is none."""
        self.saver.wait()
        kept = self.saver.last or self.run.resume
        if kept is None:
            self.guard.tell_once(self.rank, f"step {self.step}: the loss is {loss:.4f}, and there is no checkpoint yet")
            return False
        if not self.guard.may_go_back():
            self._give_up(f"the loss is {loss}, a spike again after going back {GO_BACK} times")
        at = self.step
        self.domain_losses.forget()
        if self.routing is not None:
            self.routing.forget()
        self.step = self._load_from(kept, moments=True)
        if self.metrics is not None:
            self.metrics.forget_after(self.step)
        if self.rank == 0:
            _log.warning("step %d: the loss is %.4f, a spike; on from step %d with later data", at, loss, self.step)
        return True

    def _is_over(self) -> bool:
        """Whether all steps are done, or something ends the run before."""
        is_last = self.step >= self.config.train.steps
        return is_last or self.stopping.reason is not None or self.feed.has_run_dry(self.step)

    def _tighten(self, done: float) -> None:
        for stage in self.stages:
            for moe in stage.moe_layers().values():
                moe.router.rule.tighten(done)

    def _metrics(self, window: _Window) -> dict[str, Any]:
        seconds = time.perf_counter() - window.started
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.feed.tokens_read,
            "loss": statistics.fmean(window.losses) if window.losses else None,
            "losses": window.losses,
            "grad_norm": self.last_norm,
            "learning_rate": learning_rate(self.config.train, self.step - 1, self.tokens_per_step),
            "tokens_per_second": window.tokens / seconds,
            **self.guard.told(),
        }
        line |= self._utilisation(line["tokens_per_second"] / self.num_ranks)
        self.speeds.append(line["tokens_per_second"])
        if of_domains := self.domain_losses.taken():
            told = zip(self.feed.blend.by_domain().items(), of_domains, strict=True)
            line["domains"] = {name: domain | {"loss": loss} for (name, domain), loss in told}
        if self.heldout.last:
            line["heldout"] = self.heldout.last
        if self.stopwatch is not None:
            groups = self.meshes.dispatch, self.meshes.stage.get_group(), self.group
            line["seconds_of_step"] = stopwatch.split(self.stopwatch, self.device, *groups)
            self.stopwatch = None
        if self.routing is not None and window.losses:
            line |= self.routing.line(len(window.losses))
        found = self.placement_watch.take() if self.placement_watch is not None else None
        return line | ({"placement": found} if found is not None else {})

    def _utilisation(self, tokens_per_second: float) -> dict[str, Any]:
        """What a rank does, and what share that is of what its device could; on the first rank, which tells it."""
        found: dict[str, Any] = {"tokens_per_second_per_rank": tokens_per_second}
        if self.rank == 0:
            peak = peak_of(self.device, getattr(torch, self.config.train.dtype))
            flops = tokens_per_second * flops_of_token(self.run.model, self.config.data.sequence_length)
            found |= {"mfu": flops / peak.tflops * 1e-12, "peak_tflops": peak.tflops, "peak": peak.source}
        return found

    def _summary(self) -> dict[str, Any]:
        # The first window pays for warm-up, where there is more than one.
        speeds = self.speeds[1:] or self.speeds
        summary: dict[str, Any] = {
            "first_step": self.first_step,
            "steps": self.step,
            "ranks": self.num_ranks,
            "device": str(self.device),
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "tokens_per_second_spread": [min(speeds), max(speeds)] if speeds else None,
            **self.guard.told(),
        }
        if self.stopping.reason is not None:  # who stops a run wants it to end
            told, changed = {"heldout_loss": None, "stopped": self.stopping.reason}, None
        else:
            self._tighten(1.0)
            told, changed = self.heldout.summary()
        summary |= told
        if self.routing is not None and self.speeds:
            summary |= self.routing.summary(changed)
        placed = self.placement_watch.take(wait=True) if self.placement_watch is not None else None
        return summary | ({"placement": placed} if placed is not None else {})

    def _save(self) -> None:
        moments = moment_entries(self.stages, self.optimizer, experts=self.experts)
        entries = entries_of(self.stages, experts=self.experts) | moments
        self.saver.save(self.step, entries, self.feed.blend.state())

    def _watch_routing(self) -> tuple[RoutingMetrics | None, PlacementWatch | None]:
        """What the routers do, on every rank; and whether their placement is still good, on the first."""
        moe, placement = self.run.model.moe, self.run.placement
        if moe is None or placement is None:
            return None, None
        ep_size = self.config.parallel.expert_parallel_size
        routing = RoutingMetrics(placement, ep_size, moe.top_k, self.watch, self.ledger, self.group)
        if self.rank or ep_size == 1 or moe.top_k == 1 or not self.watch.counts_pairs:
            return routing, None
        return routing, PlacementWatch(placement, stored_profile(self.config.routing.profile))

    def _look_at_placement(self) -> None:
        """Leave `profile.npz` of the steps since the last save, and begin to compare the placement with them."""
        if self.routing is None:
            return
        since, self._looked_at = self._looked_at, self.step
        tokens = (self.step - since) * self.tokens_per_step
        recent = self.routing.recent({"tokens": tokens, "step": self.step, "seed": self.config.train.seed})
        if self.rank == 0 and recent is not None:
            recent.save(self.config.output.folder / "profile.npz")
            if self.placement_watch is not None:
                self.placement_watch.look(recent, self.step)

    @contextmanager
    def folder_opened(self) -> Iterator[None]:
        """Take the run folder for this run; a run that does not go on with what is there begins with an empty one."""
        refusal: list[str | None] = [None]
        with ExitStack() as held:
            if self.rank == 0:
                try:
                    held.enter_context(run_folder.locked(self.config.output.folder))
                    self._write_run_file(self.config.output.folder)
                except UserError as error:
                    refusal = [str(error)]
            dist.broadcast_object_list(refusal, group_src=0, group=self.group)
            if refusal[0] is not None:
                raise UserError(refusal[0])
            yield

    def _write_run_file(self, folder: Path) -> None:
        name = "run.toml"
        if self.run.resume is None:
            run_folder.empty(folder)  # `resolve` asked whether that is wanted
        else:
            name = f"run.from-{self.step}.toml"
            Metrics(folder).forget_after(self.step)
        job.mark(folder)  # first: a folder with anything in it is known to be ours
        layout = f"# {self.num_ranks} ranks on {self.device.type}, torch {torch.__version__}\n"
        (folder / name).write_text(layout + to_toml(self.config), encoding="utf-8")
