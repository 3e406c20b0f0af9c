"""Dense model to mixture of experts, by cutting every FFN into experts (LLaMA-MoE, arXiv:2406.16554 section 3.1).

    FFN(x) = W_down (silu(W_gate x) * (W_up x)) is a sum over hidden neurons, so for any partition of the neurons the
    sum over experts is the dense FFN, exactly.

Neuron n is row n of w_gate and w_up and column n of w_down. Shapes: N neurons, D model dim, E experts, F neurons of the
largest.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.assignment import Neurons
from checkpoint_tools.conversion import How, ToCheckpoint
from checkpoint_tools.gates import mean_directions, new_gate, new_residual_gate
from checkpoint_tools.partition import Partitioner, PartitionOptions
from checkpoint_tools.source import Source, check_apart, open_source
from checkpoint_tools.split_files import covers_once, file_of, read_split_file, write_split_file
from checkpoint_tools.verify import TOLERANCE
from ep_engine.checksum import add, unordered_checksum
from ep_engine.deferred import Deferred, Tensors
from ep_engine.draft import Draft
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig, MoEConfig, first_sentence
from ep_engine.progress import bar

WEIGHTS = ("w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class SplitOptions:
    """How a dense model becomes a mixture of experts."""

    num_experts: int
    top_k: int
    seed: int = 0
    gate: str = "mlp"  # `mlp` or `linear`
    score_scale: float | list[float] | None = None  # or of every layer; None: E / k, which keeps the FFN's magnitude
    partition: PartitionOptions = field(default_factory=PartitionOptions)
    residual: int = 0  # experts that every token goes through, of the neurons that most clusters want, or as files say
    gate_init: Literal["random", "neurons"] = "random"  # neurons: the mean direction of an expert's rows
    score: Literal["softmax_of_chosen", "sigmoid"] = "softmax_of_chosen"  # combine weights, which add up to 1
    gate_noise: bool = False  # with a noise matrix, for noisy top-k


def split(source: Path, out: Path, options: SplitOptions, *, overwrite: bool = False) -> ModelConfig:
    """Write what `prepare` prepares; returns what was written."""
    conversion = prepare(source, out, options)
    conversion.run(How(overwrite=overwrite))
    return conversion.model


def prepare(source: Path, out: Path, options: SplitOptions) -> ToCheckpoint:
    """Split every FFN into experts: an engine checkpoint with `split.json` beside the weights.

    Experts are equal, unless published files say otherwise or they share neurons; smaller ones are filled up with
    zeros, which changes no output. Split files as LLaMA-MoE publishes them lie in `split/`. Where every neuron is in
    one expert, as it is but for assignment `shared` and some published files, each layer's experts are checked to be
    the neurons of the source, bit for bit, and the model with all experts on to be the dense model.

    Args:
        source: dense Hugging Face folder or engine checkpoint.
        out: checkpoint to write.
        options: the number of all experts must divide the FFN width where they are equal; top_k in 1..num_experts.

    Raises:
        UserError: the model is a MoE already or has FFN biases, or the sizes do not fit.
    """
    check_apart(source, out)
    model = open_source(source)
    config = moe_config(model.config, options, _sizes(model.config, options))
    cut = _Cut(model, config, options)
    ffn_bytes = sum(model.tensors.deferred[f"layers.0.ffn.{name}.weight"].num_bytes for name in WEIGHTS)
    return ToCheckpoint(
        source=model,
        out=out,
        tool="split",
        options={**asdict(options), "partition": options.partition.about()},
        config=config,
        tensors=cut.tensors,
        finish=cut.finish,
        held_bytes=4 * ffn_bytes,  # as it was read, its experts, those before, and in float32 what is clustered
        compare=TOLERANCE if cut.partitioner.covers_once(config.num_layers) else None,
        all_experts=True,
    )


def _sizes(dense: ModelConfig, options: SplitOptions) -> list[list[int]] | None:
    """[L][r + E]: the neurons of every expert, if they are not equal shares of the FFN; UserError for a bad file."""
    of, width, all_experts = options.partition, dense.intermediate_size, options.num_experts + options.residual
    if of.files is not None:
        layers = (file_of(of.files, layer, of.on) for layer in range(dense.num_layers))
        return [[len(neurons) for neurons in read_split_file(path, all_experts, width)] for path in layers]
    if of.expert_size is None:
        return None
    if (options.residual + 1) * of.expert_size > width:
        raise UserError(
            f"--expert-size ({of.expert_size}) of {options.residual} residual experts and one other is more than the "
            f"FFN width ({width}); choose a smaller one"
        )
    return [[of.expert_size] * all_experts] * dense.num_layers


def moe_config(dense: ModelConfig, options: SplitOptions, sizes: list[list[int]] | None = None) -> ModelConfig:
    """The configuration of the split model, of equal experts or of `sizes`; UserError if it cannot be made."""
    e, width, r = options.num_experts + options.residual, dense.intermediate_size, options.residual
    if dense.moe is not None:
        raise UserError(f"the model has {dense.moe.num_experts} experts per layer already; split takes a dense model")
    if dense.mlp_bias:
        raise UserError(
            "the FFNs have biases (mlp_bias is true), which no expert can own; split takes FFNs without biases"
        )
    if options.num_experts < 1 or (sizes is None and width % e):
        near = [n for n in range(1, min(width, 256) + 1) if width % n == 0]
        best = sorted(sorted(near, key=lambda n: abs(n - e))[:3])
        what = f"--num-experts and --residual-experts ({e} in all)" if options.residual else f"--num-experts ({e})"
        raise UserError(
            f"{what} must divide the FFN width ({width}) so that all experts are of one size; choose "
            f"{', '.join(map(str, best))}"
        )
    if options.residual and options.partition.method not in ("gradient", "published"):
        raise UserError(
            f"--residual-experts ({options.residual}) has no effect on --method {options.partition.method}; leave it "
            "out"
        )
    of_layer = sizes or [[width // e] * e] * dense.num_layers
    own = {size for row in of_layer for size in row[:r]}
    if len(own) > 1:
        raise UserError(f"residual experts must be of one size, the files have {sorted(own)[:9]}; correct them")
    routed = [row[r:] for row in of_layer]
    largest = max(map(max, routed))
    try:
        moe = MoEConfig(
            num_experts=options.num_experts,
            top_k=options.top_k,
            expert_hidden_size=largest,
            expert_sizes=None if all(size == largest for row in routed for size in row) else routed,
            gate=options.gate,  # pydantic checks it
            gate_noise=options.gate_noise,
            score=options.score,
            renormalise=options.score == "sigmoid",
            score_scale=options.num_experts / max(options.top_k, 1)
            if options.score_scale is None
            else options.score_scale,
            residual_experts=options.residual,
            residual_hidden_size=max(own, default=0),
            residual_scale=float(max(options.residual, 1)),  # at equal shares their plain sum
        )
        made = dense.model_copy(update={"moe": moe, "family": None, "intermediate_size": max(map(sum, of_layer))})
        return ModelConfig.model_validate(made.model_dump())
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None


def parse_scales(text: str | None) -> float | list[float] | None:
    """--score-scale as a number, or as one for every layer."""
    try:
        scales = [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(map(math.isfinite, scales)):
        raise UserError(f"--score-scale ({text}) must be a number, or numbers with commas between; correct it")
    return scales if len(scales) > 1 else next(iter(scales), None)


class _Cut:
    """The experts of all layers; those of two are in memory at a time: one is written, the next is made."""

    def __init__(self, model: Source, config: ModelConfig, options: SplitOptions) -> None:
        assert config.moe is not None, "it was just made"
        self.model, self.config, self.moe, self.options = model, config, config.moe, options
        self.width = model.config.intermediate_size
        self.whole = model.hashed()
        self.partitioner = Partitioner(
            options.partition, options.num_experts, self.width, options.seed, options.residual
        )
        self.making: dict[int, Future[list[dict[str, Tensor]]]] = {}  # by layer
        self.pool = ThreadPoolExecutor(1)

    def tensors(self, draft: Draft) -> Tensors:
        """All entries of the split model."""
        kept = self.model.tensors.deferred
        deferred = {name: one for name, one in kept.items() if ".ffn." not in name}
        d, f = self.config.hidden_size, self.moe.expert_hidden_size
        (draft.folder / "partition").mkdir(exist_ok=True)
        if self.options.partition.method == "coactivation":
            self._partition_by_text(draft)
        for layer in range(self.config.num_layers):
            dtype, at = kept[f"layers.{layer}.ffn.w_gate.weight"].dtype, f"layers.{layer}.moe"
            deferred |= {f"{at}.router.{name}": one for name, one in self._gate(draft, layer, dtype).items()}
            if self.options.residual:
                gate = new_residual_gate(self.config, self.moe, self.options.seed, layer, dtype)
                deferred[f"{at}.residual.gate.weight"] = Deferred.of(gate)
            for number in range(self.options.residual + self.moe.num_experts):
                routed = number - self.options.residual
                for name in WEIGHTS:
                    entry = (
                        f"{at}.residual.each.{number}.{name}.weight" if routed < 0 else f"{at}.experts.{routed}.{name}"
                    )
                    wide = self.moe.residual_hidden_size if routed < 0 else f
                    shape = (d, wide) if name == "w_down" else (wide, d)
                    deferred[entry] = Deferred(shape, dtype, self._maker(draft, layer, number, name, wide))
        return Tensors(deferred)

    def _gate(self, draft: Draft, layer: int, dtype: torch.dtype) -> dict[str, Deferred]:
        """The router's weights; the first matrix may come from the experts."""
        gate = new_gate(self.config, self.moe, self.options.seed, layer, dtype)
        found = {name: Deferred.of(weight) for name, weight in gate.items()}
        if self.options.gate_init == "neurons":
            rows = "w_up" if self.options.partition.on == "up_proj" else "w_gate"

            def directions() -> Tensor:
                experts = self._experts(draft, layer)[self.options.residual :]
                return mean_directions([expert[rows] for expert in experts]).to(dtype)

            found["w_in"] = Deferred(tuple(gate["w_in"].shape), dtype, directions)
            if "w_out" in gate:
                found["w_out"] = Deferred.of(torch.eye(self.moe.num_experts, dtype=dtype))
        return found

    def finish(self, draft: Draft) -> dict[str, Any]:
        """Write split.json and, if they can say it, published files; their hash for the manifest."""
        layers = [self._neurons(draft, layer) for layer in range(self.config.num_layers)]
        record = {
            **self.options.partition.about(),
            "seed": self.options.seed,
            "intermediate_size": self.width,
            "num_experts": self.moe.num_experts,
            "residual_experts": self.options.residual,  # the first of `neurons`
            "source_hash": self.model.hash(),
            "neurons": [[neurons.tolist() for neurons in experts] for experts in layers],  # [L][E][F]
        }
        if _cuts(draft).is_file():
            record["cuts"] = json.loads(_cuts(draft).read_text())  # [L]: share of the graph's weight between experts
        text = json.dumps(record)
        (draft.folder / "split.json").write_text(text)
        (draft.folder / "split").mkdir(exist_ok=True)
        as_lists = self.options.residual > 0 or not all(covers_once(experts, self.width) for experts in layers)
        for layer, neurons in enumerate(layers):
            path = file_of(draft.folder / "split", layer, self.options.partition.on)
            write_split_file(path, neurons, self.width, as_lists=as_lists)
        shutil.rmtree(draft.folder / "partition")
        return {"split_hash": hashlib.sha256(text.encode()).hexdigest()}

    def _maker(self, draft: Draft, layer: int, expert: int, name: str, wide: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            part = self._experts(draft, layer)[expert][name]
            zeros = wide - part.shape[1 if name == "w_down" else 0]
            return F.pad(part, (0, zeros) if name == "w_down" else (0, 0, 0, zeros)) if zeros else part

        return make

    def _experts(self, draft: Draft, layer: int) -> list[dict[str, Tensor]]:
        wanted = range(layer, min(layer + 2, self.config.num_layers))
        self.making = {n: self.making[n] for n in wanted if n in self.making}  # frees the one before
        for n in wanted:
            if n not in self.making:
                self.making[n] = self.pool.submit(self._make, draft, n)
        return self.making[layer].result()

    def _make(self, draft: Draft, layer: int) -> list[dict[str, Tensor]]:
        ffn = {name: self.whole[f"layers.{layer}.ffn.{name}.weight"] for name in WEIGHTS}
        neurons = self._neurons(draft, layer, ffn)
        experts = cut_experts(ffn, neurons)
        if covers_once(neurons, self.width):
            check_experts(ffn, experts, neurons, layer)
        return experts

    def _neurons(self, draft: Draft, layer: int, ffn: Mapping[str, Tensor] | None = None) -> Neurons:
        """Of a layer, from a file where a run that was interrupted left them."""
        path = _file(draft, layer)
        if path.is_file():
            with np.load(path) as kept:
                return [kept[name] for name in kept.files]
        given = ffn or {name: self.whole[f"layers.{layer}.ffn.{name}.weight"] for name in WEIGHTS}
        neurons = self.partitioner.layer(layer, given)
        _keep(path, neurons)
        return neurons

    def _partition_by_text(self, draft: Draft) -> None:
        """All layers at once, for the text goes through one after the other; not again where a run has done so."""
        if _cuts(draft).is_file():
            return
        cuts = []
        with bar("partitioning layers", self.config.num_layers) as advance:
            for layer, neurons, cut in self.partitioner.from_text(self.model):
                _keep(_file(draft, layer), neurons)
                cuts.append(asdict(cut))
                advance(layer + 1)
        _cuts(draft).write_text(json.dumps(cuts))


def _file(draft: Draft, layer: int) -> Path:
    return draft.folder / "partition" / f"{layer}.npz"


def _cuts(draft: Draft) -> Path:
    return draft.folder / "partition" / "cuts.json"


def _keep(path: Path, neurons: Neurons) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *neurons)
    partial.rename(path)


def cut_experts(ffn: Mapping[str, Tensor], partition: Neurons) -> list[dict[str, Tensor]]:
    """The weights of every expert: views of three tensors in which neurons stand expert by expert."""
    order = torch.from_numpy(np.concatenate(partition))
    in_order = {name: w[:, order] if name == "w_down" else w[order] for name, w in ffn.items()}
    sizes = [len(neurons) for neurons in partition]
    parts = {name: w.split(sizes, dim=1 if name == "w_down" else 0) for name, w in in_order.items()}
    return [{name: parts[name][expert] for name in ffn} for expert in range(len(partition))]


def check_experts(ffn: Mapping[str, Tensor], experts: list[dict[str, Tensor]], partition: Neurons, layer: int) -> None:
    """Fault unless the experts have every neuron of the FFN once, and its bits: a hash that is blind to their order.

    Args:
        ffn: w_gate (N, D), w_up (N, D), w_down (D, N).
        experts: each with w_gate (F, D), w_up (F, D), w_down (D, F).
        partition: the neurons that each should have.
        layer: named in the message, and the first expert that is not what it should be.
    """
    for name in WEIGHTS:
        dim = 1 if name == "w_down" else 0
        parts = [unordered_checksum(expert[name], dim=dim) for expert in experts]
        if add(*parts) != unordered_checksum(ffn[name], dim=dim):
            wanted = [expert[name] for expert in cut_experts({name: ffn[name]}, partition)]
            given = [expert[name] for expert in experts]
            wrong = [e for e, pair in enumerate(zip(given, wanted, strict=True)) if not torch.equal(*pair)]
            which = f"expert {wrong[0]} is not what it should be" if wrong else "a neuron is in two of them"
            raise Fault(
                f"the experts of layer {layer} do not have every neuron of {name} once and unchanged: {which}; this is "
                "our bug, report it"
            )
