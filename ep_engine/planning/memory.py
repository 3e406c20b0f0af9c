"""Memory: bytes of every kind on a rank, followed through one step of the optimiser.

A step is walked as it runs (forwards and backwards of parts and stages, layer by layer), what is gathered, kept and
freed on the way is added up, and the moment with the most is what is told. What torch and its libraries hold beside
tensors (code, caches of oneDNN, buffers of gloo) is not in it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ep_engine.config import RunConfig
from ep_engine.model_config import ModelConfig
from ep_engine.parallelize import largest_exchange
from ep_engine.placement import Placement
from ep_engine.planning.activations import Kept, Part
from ep_engine.planning.expert_traffic import Groups, Passed
from ep_engine.planning.weight_groups import StageWeights, Weights, stage_weights
from ep_engine.stages import Stages, order_of_work

KINDS = (
    "parameters",
    "moments",
    "gradients",
    "gathered",
    "reduction",
    "activations",
    "logits",
    "rows",
    "transport",
    "pipeline",
    "working",
)
_FLOAT, _LONG = 4, 8


@dataclass
class Tape:
    """What is there at a moment of a step, by kind, and at the moment when it was most."""

    now: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    when: str = ""

    def hold(self, moment: str, **kinds: int) -> None:
        """More of some kinds, or less."""
        self.now.update(kinds)
        if self.now.total() > self.peak.total():
            self.peak, self.when = self.now.copy(), moment

    def touch(self, moment: str, **kinds: int) -> None:
        """More of some kinds, for a moment."""
        self.hold(moment, **kinds)
        self.now.subtract(kinds)


class Step:
    """One step of the optimiser on one rank.

    Attributes:
        tape: what is there.
        gathers: bytes of weights that go to each other rank of an axis.
        reductions: of gradients, as well.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
        stages: Stages,
        placement: Placement | None,
        groups: Groups,
        rank: int,
        passed: Mapping[tuple[int, int, int], Passed],
        *,
        transport: str = "none",
    ) -> None:
        self.config, self.model, self.stages, self.rank, self.passed = config, model, stages, rank, passed
        self.dp = len(groups.around(rank, "dp"))
        self.part = Part(config, model, self.dp)
        pipeline = groups.around(rank, "pp")
        self.size, self.position = len(pipeline), pipeline.index(rank)
        self.parts = config.train.micro_batches
        self.weights = {
            stage: stage_weights(config, model, placement, groups, rank, stages.layers[stage])
            for stage in stages.on(self.position)
        }
        self.tape = Tape()
        self.gathers: Counter[str] = Counter()
        self.reductions: Counter[str] = Counter()
        self._gathered: set[int] = set()  # which groups, by identity: equal ones are different weights
        self._summed: set[int] = set()  # which have gradients that wait for those of other parts
        self._transport = transport
        on_cpu = config.parallel.device != "cuda"
        self._shared = transport == "shared_memory" or (transport == "hierarchical" and on_cpu)  # the last hop
        self._rows, self._arena = 0, 0  # rows that live, and pages of the arena, which stay once they are written
        self._buffer = 0  # of the last gather or reduction, which FSDP keeps until the next

    def walk(self) -> Tape:
        """All of the step."""
        for stage, weights in self.weights.items():
            ends = (stage > 0) + (stage < self.stages.last) if self.size > 1 else 0
            self.tape.hold(
                "before the step",
                parameters=_FLOAT * sum(group.share for group in weights.all()),
                moments=2 * _FLOAT * sum(group.trained.own for group in weights.all()),
                pipeline=ends * self.parts * self.part.hidden,  # room for what comes, of every part
            )
        if self._transport == "cuda_ipc":  # an arena for the worst case, twice, as connect.py makes it
            parallel, tokens = self.config.parallel, self.part.tokens // self.part.tp
            etp = parallel.expert_tensor_parallel_size
            ranks = parallel.expert_parallel_size * etp
            arena = 2 * largest_exchange(self.model, self.config.moe, tokens, ranks, etp)
            self.tape.hold("before the step", transport=arena)
        order = order_of_work(self.stages, self.size, self.position, self.config.parallel.pipeline_schedule, self.parts)
        left = Counter(stage for _, stage, _ in order)
        for kind, stage, part in order:
            left[stage] -= 1
            if kind == "forward":
                self._forward(stage, part)
            else:
                self._backward(kind, stage, part, last=left[stage] == 0)
        largest = max(group.trained.largest for weights in self.weights.values() for group in weights.all())
        self.tape.touch("norm of the gradients", working=_FLOAT * largest // self.dp)
        return self.tape

    def _kept(self, layer: int, part: int) -> Kept:
        return self.part.layer(layer, self.passed.get((self.rank, layer, part)))

    def _remaining(self, layer: int, kept: Kept) -> Counter[str]:
        """What stays of a layer between its forward and its backward."""
        recompute = self.config.train.recompute
        if recompute == "full":
            moe = self.model.moe_of(layer)
            chosen = _LONG * moe.top_k * self.part.tokens // self.part.tp if moe else 0
            return Counter(activations=self.part.hidden + chosen)
        if recompute == "selective":
            entered = self.part.hidden - self.part.residual()  # what a second pass begins with, and no norm keeps
            return Counter(activations=kept.residual + entered + kept.ffn - kept.shared, rows=kept.rows)
        return Counter(activations=kept.total - kept.rows, rows=kept.rows)

    def _end(self, stage: int) -> Counter[str]:
        """What stays of the end of a stage: its output, or the last norm and what the head and the loss keep."""
        if stage < self.stages.last:
            return Counter(activations=self.part.hidden)
        kept = self.part.norm() + self.part.residual() + self.part.hidden * self.part.tp
        if self.part.tp == 1:  # the gradient of the logits lies where they were
            return Counter(activations=kept, logits=self.part.logits * self.part.itemsize)
        output = self.part.itemsize if self.size > 1 else 0  # a pipeline keeps what the last stage returns
        return Counter(activations=kept, logits=self.part.logits * (_FLOAT + output))

    def _received(self, stage: int) -> int:
        """What a first layer keeps of its input and the room of the pipeline has already."""
        of_input = self.part.residual() if self.config.train.recompute == "none" else self.part.hidden
        return of_input if stage > 0 else 0

    def _forward(self, stage: int, part: int) -> None:
        moment = f"forward of part {part} in stage {stage}"
        weights = self.weights[stage]
        self._gather(weights.root, moment)
        self.tape.hold(moment, activations=-self._received(stage))
        for layer, of_layer in weights.layers.items():
            for group in of_layer:
                self._gather(group, moment)
            kept = self._kept(layer, part)
            remaining = self._remaining(layer, kept)
            self._hold(moment, remaining)
            self.tape.touch(moment, working=kept.total - remaining.total() + kept.working)
            for group in of_layer:
                if group.reshard:
                    self._release(group)
        self._set_buffer(moment, 0)
        end = self._end(stage)
        if stage == self.stages.last:
            widened = _FLOAT if self.part.itemsize < _FLOAT else 0
            on_the_way = self.part.logits * (self.part.itemsize + widened + _FLOAT)
            if self.part.tp == 1:
                on_the_way = self.part.logits * self.part.itemsize
            self.tape.touch(moment, activations=end["activations"], logits=on_the_way)
        self.tape.hold(moment, **end)

    def _backward(self, kind: str, stage: int, part: int, *, last: bool) -> None:
        moment = f"backward of part {part} in stage {stage}"
        weights = self.weights[stage]
        if kind != "backward_weight":
            if stage == self.stages.last and self.part.tp > 1:  # gradients of the loss and of its split softmax
                self.tape.touch(moment, logits=3 * _FLOAT * self.part.logits)
            self._drop(moment, Counter(logits=self._end(stage)["logits"]))
        for layer, of_layer in reversed(weights.layers.items()):
            kept = self._kept(layer, part)
            if kind == "backward_input":
                self.tape.touch(moment, working=kept.working)
                self.tape.hold(moment, activations=kept.for_weights)
                continue
            if kind == "backward_weight":
                self._drop(moment, Counter(activations=kept.for_weights))
            self._layer_backward(moment, layer, of_layer, kept, last=last)
        if kind != "backward_input":
            self._drop(moment, Counter(activations=self._end(stage)["activations"] - self._received(stage)))
            self._gradients(moment, weights.root)
            if last or self.size == 1:
                self._finish(moment, weights, reduce=last)

    def _layer_backward(self, moment: str, layer: int, of_layer: list[Weights], kept: Kept, *, last: bool) -> None:
        for group in of_layer:
            self._gather(group, moment)
        again = 0
        if self.config.train.recompute == "full":
            again = kept.total - self.part.residual()
        self.tape.hold(moment, working=again)
        of_experts = of_layer[-1:] if self.model.moe_of(layer) else []
        computed = kept.gate_up if self.config.train.recompute == "selective" else 0
        for group in of_experts:
            gradients = self.part.itemsize * group.gathered if group.trained.shapes else 0  # of all, or of none
            self.tape.touch(moment, working=computed + kept.working, gradients=gradients)
        freed = Counter(rows=kept.rows, activations=kept.gate_up)
        if self.config.train.recompute == "full":
            freed = Counter(working=kept.rows + kept.gate_up)
        elif computed:
            freed = Counter(rows=kept.rows)
        self._drop(moment, freed)
        for group in of_experts:
            self._gradients(moment, group)
            self._reduce_now(moment, group, last=last)
        self.tape.touch(moment, working=kept.attention if self.config.train.recompute == "selective" else 0)
        rest = self._remaining(layer, kept)
        if again:
            self._drop(moment, Counter(working=again - freed["working"]))
        else:
            rest.subtract(freed)
        for group in of_layer[: len(of_layer) - len(of_experts)]:
            self._gradients(moment, group)
        self._drop(moment, rest)
        for group in of_layer[: len(of_layer) - len(of_experts)]:
            self._reduce_now(moment, group, last=last)

    def _hold(self, moment: str, kinds: Counter[str]) -> None:
        rows = kinds["rows"]
        self._rows += rows
        if self._shared:  # what is freed can be written again, but is not given back
            rows = max(0, self._rows - self._arena)
            self._arena += rows
        self.tape.hold(moment, **{**kinds, "rows": rows})

    def _drop(self, moment: str, kinds: Counter[str]) -> None:
        self._hold(moment, Counter({kind: -size for kind, size in kinds.items()}))

    def _gather(self, group: Weights, moment: str) -> None:
        """Bring a group's weights together in the dtype of computation, through a buffer if there are several ranks."""
        if id(group) in self._gathered or group.alone:
            return
        size = group.gathered * group.itemsize
        if group.ranks > 1:
            self.tape.touch(moment, reduction=size)
            self._set_buffer(moment, size)
        self.tape.hold(moment, gathered=size)
        if group.sliced:  # slices are brought into the order of the weights by another copy
            self.tape.touch(moment, reduction=size)
        self.gathers[group.axis] += group.share * group.itemsize
        self._gathered.add(id(group))

    def _release(self, group: Weights) -> None:
        if id(group) in self._gathered:
            self._gathered.remove(id(group))
            self.tape.hold("", gathered=-group.gathered * group.itemsize)

    def _set_buffer(self, moment: str, size: int) -> None:
        self.tape.hold(moment, reduction=size - self._buffer)
        self._buffer = size

    def _gradients(self, moment: str, group: Weights) -> None:
        """Gradients of gathered weights: in the dtype of computation, or added up in float32 over parts."""
        size = group.trained.gathered * group.itemsize
        if self.size == 1 and self.parts == 1 and not group.alone:
            self.tape.hold(moment, gradients=size)
        elif id(group) in self._summed:
            self.tape.touch(moment, gradients=size)
        else:
            self._summed.add(id(group))
            self.tape.hold(moment, gradients=group.trained.gathered * _FLOAT)
            self.tape.touch(moment, gradients=size if group.itemsize < _FLOAT else 0)

    def _reduce_now(self, moment: str, group: Weights, *, last: bool) -> None:
        """In a pipeline weights stay, and gradients wait for the end of the step."""
        if self.size == 1 and last:
            self._reduce(moment, group)
        elif self.size == 1:
            self._release(group)

    def _reduce(self, moment: str, group: Weights) -> None:
        if group.alone:
            return
        self._release(group)
        trained, summed = group.trained, id(group) in self._summed
        self._summed.discard(id(group))
        if not trained.shapes:
            return
        self.reductions[group.axis] += trained.share * _FLOAT
        self._set_buffer(moment, 0)
        self._set_buffer(moment, trained.gathered * _FLOAT)
        if group.sliced:
            self.tape.touch(moment, reduction=trained.gathered * group.itemsize)
        self.tape.hold(moment, gradients=-trained.gathered * (_FLOAT if summed else group.itemsize))
        self.tape.hold(moment, gradients=trained.share * _FLOAT)
        if group.ranks == 1:
            self.tape.touch(moment, reduction=trained.gathered * _FLOAT)  # a division by 1

    def _finish(self, moment: str, weights: StageWeights, *, reduce: bool) -> None:
        """The end of a backward: in a pipeline that of the stage's step."""
        for group in weights.all() if self.size > 1 else [weights.root]:
            if reduce:
                self._reduce(moment, group)
            else:
                self._release(group)
        self._set_buffer(moment, 0)
