"""Dense model to mixture of experts, by cutting every FFN into experts (LLaMA-MoE, arXiv:2406.16554 section 3.1).

    FFN(x) = W_down (silu(W_gate x) * (W_up x)) is a sum over hidden neurons, so for any partition of the neurons the
    sum over experts is the dense FFN, exactly.

Neuron n is row n of w_gate and w_up and column n of w_down. Shapes: N neurons, D model dim, E experts, F = N / E.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.assignment import greedy, optimal, shared
from checkpoint_tools.balanced_kmeans import Metric, balanced_kmeans
from checkpoint_tools.importance import Importance
from checkpoint_tools.source import Source, check_apart, open_source
from checkpoint_tools.split_files import covers_once, file_of, read_split_file, write_split_file
from ep_engine.checkpoint import write_model
from ep_engine.checksum import checksum
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig, MoEConfig, first_sentence
from ep_engine.output import check_output_folder, whole_folder
from ep_engine.progress import track

Method = Literal["random", "clustering", "gradient", "published"]
Projection = Literal["up_proj", "gate_proj"]
Assignment = Literal["optimal", "greedy", "shared"]

_WAYS = {"greedy": greedy, "shared": shared}
_WEIGHTS = ("w_gate", "w_up", "w_down")
_PARTITION, _GATE = 0, 1  # streams of random numbers: the partition does not depend on the gate
_CHECK_TOKENS = 4
_CHECK_TOLERANCE = 1e-9  # fp64, relative to the largest output: only the order of the sums over neurons differs


@dataclass(frozen=True)
class SplitOptions:
    """How a dense model becomes a mixture of experts."""

    num_experts: int
    top_k: int
    seed: int = 0
    gate: str = "mlp"  # `mlp` or `linear`
    score_scale: float | None = None  # None: E / k, which keeps the magnitude of the FFN's output
    method: Method = "random"
    metric: Metric = "l2"  # of clustering, between rows of length one
    on: Projection = "up_proj"  # whose rows are clustered, whose importance is read
    files: Path | None = None  # of published: folder of split files
    importance: Path | None = None  # of gradient: folder of importance files
    assignment: Assignment = "optimal"  # of gradient

    def about(self) -> dict[str, Any]:
        """How neurons were given to experts, for split.json."""
        own: dict[str, dict[str, Any]] = {
            "random": {},
            "published": {"files": str(self.files), "on": self.on},
            "clustering": {"metric": self.metric, "on": self.on},
            "gradient": {"importance": str(self.importance), "on": self.on, "assignment": self.assignment},
        }
        return {"method": self.method, "seed": self.seed, **own[self.method]}


def split(source: Path, out: Path, options: SplitOptions, *, overwrite: bool = False) -> ModelConfig:
    """Split every FFN into equal experts and write an engine checkpoint with `split.json` beside the weights.

    Split files as LLaMA-MoE publishes them lie in `split/`.

    `random`: every layer has a shuffle of its own. `clustering`: neurons with similar rows of w_up or w_gate share an
    expert. `gradient`: neurons go to the expert whose cluster of a corpus needs them most. `published`: as files say.
    The identity "all experts on = dense" is checked in every layer, in fp64, but where a neuron is in several experts
    or in none, as assignment `shared` and published files may have it.

    Args:
        source: dense Hugging Face folder or engine checkpoint.
        out: checkpoint to write.
        options: num_experts must divide the FFN width; top_k in 1..num_experts.
        overwrite: replace `out` if it is a non-empty folder.

    Raises:
        UserError: the model is a MoE already or has FFN biases, the sizes do not fit, or `out` exists.
        Fault: the experts together are not the dense FFN.
    """
    check_apart(source, out)
    check_output_folder(out, overwrite=overwrite)
    model = open_source(source)
    config = moe_config(model.config, options)
    width = model.config.intermediate_size
    partition: list[list[np.ndarray]] = []
    tensors = {name: tensor for name, tensor in model.tensors.items() if ".ffn." not in name}
    scores = None
    if options.importance is not None:
        scores = Importance(options.importance, options.on, options.num_experts, width)
    for layer in track(range(config.num_layers), "splitting layers"):
        ffn = {name: model.tensors[f"layers.{layer}.ffn.{name}.weight"] for name in _WEIGHTS}
        partition.append(_partition(ffn, options, layer, scores))
        experts = [_expert(ffn, neurons) for neurons in partition[layer]]
        if options.method in ("random", "clustering") or covers_once(partition[layer], width):
            check_identity(ffn, experts, partition[layer], layer)
        at = f"layers.{layer}.moe"
        tensors |= {f"{at}.experts.{e}.{name}": w for e, expert in enumerate(experts) for name, w in expert.items()}
        gate = new_gate(config, options.num_experts, options.gate, options.seed, layer, ffn["w_gate"].dtype)
        tensors |= {f"{at}.router.{name}": w for name, w in gate.items()}
    record = {
        **options.about(),
        "intermediate_size": width,
        "num_experts": options.num_experts,
        "source_checksum": source_checksum(model),
        "neurons": [[neurons.tolist() for neurons in experts] for experts in partition],  # [L][E][F], ascending
    }
    with whole_folder(out, overwrite=overwrite) as draft:
        write_model(draft, config, tensors, source=source)
        (draft / "split.json").write_text(json.dumps(record))
        if all(covers_once(experts, width) for experts in partition):
            (draft / "split").mkdir()
            for layer, neurons in enumerate(partition):
                write_split_file(file_of(draft / "split", layer, options.on), neurons, width)
    return config


def moe_config(dense: ModelConfig, options: SplitOptions) -> ModelConfig:
    """The configuration of the split model; UserError if it cannot be made."""
    e, width = options.num_experts, dense.intermediate_size
    if dense.moe is not None:
        raise UserError(f"the model has {dense.moe.num_experts} experts per layer already; split takes a dense model")
    if dense.mlp_bias:
        raise UserError(
            "the FFNs have biases (mlp_bias is true), which no expert can own; split takes FFNs without biases"
        )
    if e < 1 or width % e:
        near = [n for n in range(1, min(width, 256) + 1) if width % n == 0]
        best = sorted(sorted(near, key=lambda n: abs(n - e))[:3])
        raise UserError(
            f"--num-experts ({e}) must divide the FFN width ({width}) so that all experts are of one size; "
            f"choose {', '.join(map(str, best))}"
        )
    try:
        moe = MoEConfig(
            num_experts=e,
            top_k=options.top_k,
            expert_hidden_size=width // e,
            gate=options.gate,  # type: ignore[arg-type]  # pydantic checks it
            score_scale=e / max(options.top_k, 1) if options.score_scale is None else options.score_scale,
        )
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None
    return dense.model_copy(update={"moe": moe})


def _partition(
    ffn: Mapping[str, Tensor], options: SplitOptions, layer: int, scores: Importance | None
) -> list[np.ndarray]:
    """The neurons of every expert, ascending."""
    if options.files is not None:
        path = file_of(options.files, layer, options.on)
        return read_split_file(path, options.num_experts, len(ffn["w_up"]))
    if scores is not None:
        score_EN, size = scores.layer(layer), len(ffn["w_up"]) // options.num_experts
        found = optimal(score_EN) if options.assignment == "optimal" else _WAYS[options.assignment](score_EN, size)
        return [np.sort(neurons) for neurons in found]
    if options.method == "random":
        return random_partition(len(ffn["w_up"]), options.num_experts, options.seed, layer)
    rows_ND = F.normalize(ffn["w_up" if options.on == "up_proj" else "w_gate"].float(), dim=1)
    clusters = balanced_kmeans(rows_ND, options.num_experts, metric=options.metric, seed=options.seed)
    return [np.flatnonzero(clusters.label_N == expert) for expert in range(options.num_experts)]


def random_partition(width: int, num_experts: int, seed: int, layer: int) -> list[np.ndarray]:
    """E index sets of N / E neurons each, int64, ascending within an expert."""
    shuffled = np.random.default_rng([seed, _PARTITION, layer]).permutation(width)
    return [np.sort(part) for part in np.split(shuffled, num_experts)]


def _expert(ffn: Mapping[str, Tensor], neurons: np.ndarray) -> dict[str, Tensor]:
    index = torch.from_numpy(neurons)
    return {name: ffn[name][:, index] if name == "w_down" else ffn[name][index] for name in _WEIGHTS}


def new_gate(
    config: ModelConfig, num_experts: int, gate: str, seed: int, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Router weights from N(0, initializer_range), as in LLaMA-MoE v1: (E, D), and (E, E) for an mlp gate."""
    e, random = num_experts, np.random.default_rng([seed, _GATE, layer])
    shapes = {"w_in": (e, config.hidden_size)} | ({"w_out": (e, e)} if gate == "mlp" else {})
    draws = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {
        name: torch.from_numpy(draw * np.float32(config.initializer_range)).to(dtype) for name, draw in draws.items()
    }


def check_identity(
    ffn: Mapping[str, Tensor], experts: list[dict[str, Tensor]], partition: list[np.ndarray], layer: int
) -> None:
    """Fault unless the partition covers every neuron once and all experts together give the dense output.

    Args:
        ffn: w_gate (N, D), w_up (N, D), w_down (D, N).
        experts: E times w_gate (F, D), w_up (F, D), w_down (D, F).
        partition: the neurons of every expert.
        layer: named in the message.
    """
    width, d = ffn["w_gate"].shape
    if not np.array_equal(np.sort(np.concatenate(partition)), np.arange(width)):
        raise Fault(
            f"the partition of layer {layer} does not hold each of {width} neurons once; this is our bug, report it"
        )
    generator = torch.Generator().manual_seed(layer)
    x = torch.randn(_CHECK_TOKENS, d, dtype=torch.float64, generator=generator)
    dense = _ffn(x, ffn)
    together = torch.stack([_ffn(x, expert) for expert in experts]).sum(dim=0)
    gap, scale = float((dense - together).abs().max()), float(dense.abs().max())
    # Written so that NaN, in the source's weights for example, does not pass.
    if not gap <= _CHECK_TOLERANCE * max(scale, torch.finfo(torch.float64).tiny):
        raise Fault(
            f"layer {layer} with all experts on differs from the dense layer by {gap:.3g} (outputs up to {scale:.3g}); "
            "check the source's weights for NaN"
        )


def _ffn(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    w_gate, w_up, w_down = (weights[name].double() for name in _WEIGHTS)
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def source_checksum(model: Source) -> str:
    """sha256 over the name and checksum of every entry: the same for a Hugging Face folder and its conversion."""
    digest = hashlib.sha256()
    for name in sorted(model.tensors):
        digest.update(f"{name} {checksum(model.tensors[name]):016x}\n".encode())
    return digest.hexdigest()
