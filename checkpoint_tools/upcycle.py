"""Dense model to mixture of experts by copying (sparse upcycling, arXiv:2212.05055), the same function at step 0.

Every FFN becomes E experts. With granularity G it is first cut into G slices of its hidden width, and a group is one of
each (virtual groups, arXiv:2410.07524): expert r * G + i is slice i in group r. The router's rows are equal within a
group, so a token chooses whole groups, each expert with 1 / G of its group's weight, which a factor G on the combine
weights undoes: with weights that add up to 1 the layer is the dense FFN, exactly.

Where weights are those of a softmax over all experts they add up to about K / E, and a factor E G / K on the experts
themselves undoes that: of w_down alone, exact where all scores are equal, or its cube root of all three matrices, as
Megatron-LM has it.

Shapes: N hidden width of the FFN, D model dim, E experts, F = N / G, R = E / G groups.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.conversion import How, ToCheckpoint
from checkpoint_tools.gates import in_groups, new_gate
from checkpoint_tools.source import check_apart, open_source
from checkpoint_tools.split import WEIGHTS
from checkpoint_tools.verify import TOLERANCE
from ep_engine.deferred import Deferred, Tensors
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, first_sentence

Gate = Literal["linear", "mlp", "mlp_gelu", "cosine"]
Scale = Literal["none", "w_down", "cube-root"]

_NOISE, _DROP = 2, 3  # streams of random numbers, beside those of partitions and gates


@dataclass(frozen=True)
class UpcycleOptions:
    """How a dense model becomes a mixture of experts."""

    num_experts: int | None  # of every layer with experts; None: as experts_per_layer says
    top_k: int
    granularity: int = 1
    seed: int = 0
    gate: Gate = "linear"
    gate_hidden_size: int = 0  # of the gates mlp_gelu and cosine; 0: 256
    gate_init: Literal["random", "zero"] = "random"
    score: Literal["softmax_of_chosen", "softmax", "sigmoid"] = "softmax_of_chosen"
    scale: Scale = "w_down"  # of experts, where the score is `softmax`
    start_layer: int = 0  # the first with experts
    layer_step: int = 1  # from one with experts to the next
    experts_per_layer: tuple[int, ...] = ()  # of every layer of the model, 0 where its FFN stays (a pyramid)
    noise: float = 0.0  # added to the experts, relative to the standard deviation of each matrix
    drop: float = 0.0  # share of an expert's neurons that begin anew (Drop-Upcycling, arXiv:2502.19261)
    residual: bool = False  # the FFN stays beside experts that add nothing at first (arXiv:2201.05596)


def upcycle(source: Path, out: Path, options: UpcycleOptions, *, overwrite: bool = False) -> ModelConfig:
    """Write what `prepare` prepares; returns what was written."""
    conversion = prepare(source, out, options)
    conversion.run(How(overwrite=overwrite))
    return conversion.model


def prepare(source: Path, out: Path, options: UpcycleOptions) -> ToCheckpoint:
    """Copy FFNs into experts: an engine checkpoint.

    Experts are views of the dense weights until they are written, one by one.

    Args:
        source: dense Hugging Face folder or engine checkpoint.
        out: checkpoint to write.
        options: granularity divides the FFN width, num_experts and top_k.

    Raises:
        UserError: the model is a MoE already or has FFN biases, the sizes do not fit, or options have no effect.
    """
    check_apart(source, out)
    model = open_source(source)
    config = moe_config(model.config, options)
    moe = config.moe
    assert moe is not None, "it was just made"
    kept, whole = model.tensors.deferred, model.hashed()
    alike: dict[str, Callable[[], Tensor]] = {}
    deferred = {name: one for name, one in kept.items() if ".ffn." not in name}
    for layer in range(config.num_layers):
        ffn = {name: f"layers.{layer}.ffn.{name}.weight" for name in WEIGHTS}
        if layer in config.dense_layers:
            deferred |= {entry: kept[entry] for entry in ffn.values()}
            continue
        at, dtype = f"layers.{layer}.moe", kept[ffn["w_gate"]].dtype
        here = config.moe_of(layer)
        assert here is not None, "all others have experts"
        gate = in_groups(new_gate(config, here, options.seed, layer, dtype), options.granularity)
        if options.gate_init == "zero":
            last = "w_out" if "w_out" in gate else "w_in"
            gate[last] = torch.zeros_like(gate[last])
        deferred |= {f"{at}.router.{name}": Deferred.of(weight) for name, weight in gate.items()}
        if options.residual:
            deferred[f"{at}.residual.gate.weight"] = Deferred.of(torch.zeros(1, config.hidden_size, dtype=dtype))
            deferred |= {f"{at}.residual.each.0.{name}.weight": kept[entry] for name, entry in ffn.items()}
        for expert in range(here.num_experts):
            for name, entry in ffn.items():
                d, f = config.hidden_size, moe.expert_hidden_size
                factor = _factor(options, name, here.num_experts)
                make = _maker(whole, entry, name, options, layer, expert, factor)
                shape = (d, f) if name == "w_down" else (f, d)
                deferred[f"{at}.experts.{expert}.{name}"] = Deferred(shape, dtype, make)
                if not (options.noise or options.drop):
                    alike[f"{at}.experts.{expert}.{name}"] = _slice(model.tensors, entry, name, options, expert, factor)
    tensors = Tensors(deferred)
    return ToCheckpoint(
        source=model,
        out=out,
        tool="upcycle",
        options=asdict(options),
        config=config,
        tensors=lambda _: tensors,
        alike=alike,
        compare=TOLERANCE if _preserves(options) else None,
    )


def _preserves(options: UpcycleOptions) -> bool:
    """Whether the model computes the same at first."""
    if options.residual:
        return True
    uniform = options.gate_init == "zero" and options.scale == "w_down"
    return not options.noise and not options.drop and (options.score != "softmax" or uniform)


def _maker(
    whole: Tensors, entry: str, name: str, options: UpcycleOptions, layer: int, expert: int, factor: float
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        dense = whole[entry]
        dim = 1 if name == "w_down" else 0
        part = dense.chunk(options.granularity, dim=dim)[expert % options.granularity]
        if options.noise or options.drop:
            part = _changed(part, dim, options, [layer, expert, WEIGHTS.index(name)])
        if name == "w_down" and options.residual:
            return torch.zeros_like(part)
        return part if factor == 1.0 else (part.float() * factor).to(part.dtype)

    return make


def _slice(
    dense: Tensors, entry: str, name: str, options: UpcycleOptions, expert: int, factor: float
) -> Callable[[], Tensor]:
    """What an expert of a copy without changes must be: its rows or columns, one slice after the other."""

    def make() -> Tensor:
        whole = dense[entry].T if name == "w_down" else dense[entry]
        size = len(whole) // options.granularity
        first = expert % options.granularity * size
        rows = whole[first : first + size].contiguous()
        if name == "w_down" and options.residual:
            rows = torch.zeros_like(rows)
        scaled = rows if factor == 1.0 else (rows.float() * factor).to(rows.dtype)
        return scaled.T if name == "w_down" else scaled

    return make


def _factor(options: UpcycleOptions, name: str, num_experts: int) -> float:
    """On a matrix of an expert, so that softmax over all experts does not make the layer small."""
    if options.score != "softmax" or options.scale == "none":
        return 1.0
    whole = num_experts * options.granularity / options.top_k
    if options.scale == "cube-root":
        return float(whole ** (1 / 3))
    return whole if name == "w_down" else 1.0


def _changed(part: Tensor, dim: int, options: UpcycleOptions, at: list[int]) -> Tensor:
    """With noise, and with some of the expert's neurons drawn anew from the spread of the matrix."""
    wide = part.float()
    spread = float(wide.std())
    if options.noise:
        noise = np.random.default_rng([options.seed, _NOISE, *at]).standard_normal(wide.shape, dtype=np.float32)
        wide = wide + options.noise * spread * torch.from_numpy(noise)
    if options.drop:
        # The same neurons of all three matrices.
        size = wide.shape[dim]
        chosen = np.random.default_rng([options.seed, _DROP, *at[:2]]).permutation(size)[: round(options.drop * size)]
        index = torch.from_numpy(chosen)
        shape = [len(index) if axis == dim else n for axis, n in enumerate(wide.shape)]
        fresh = np.random.default_rng([options.seed, _DROP, *at, 1]).standard_normal(shape, dtype=np.float32)
        wide = wide.index_copy(dim, index, float(wide.mean()) + spread * torch.from_numpy(fresh))
    return wide.to(part.dtype)


def parse_experts(text: str | None) -> tuple[int, ...]:
    """--experts-per-layer as numbers; () for None."""
    if text is None:
        return ()
    try:
        each = tuple(int(part) for part in text.split(","))
    except ValueError:
        each = (-1,)
    if min(each) < 0:
        raise UserError(
            f"--experts-per-layer ({text}) must be numbers with commas between, such as 0,4,4,8; correct it"
        )
    return each


def _experts_per_layer(dense: ModelConfig, options: UpcycleOptions) -> list[int]:
    """How many experts each layer gets, 0 for none."""
    given, count = options.experts_per_layer, options.num_experts
    if (count is None) == (not given):
        raise UserError(
            f"give either --num-experts ({count}) or --experts-per-layer ({','.join(map(str, given)) or None}), the "
            "experts of a layer"
        )
    if count is not None:
        if options.start_layer >= dense.num_layers:
            raise UserError(
                f"--start-layer ({options.start_layer}) must be below the model's layers ({dense.num_layers}), or no "
                "layer gets experts; choose a smaller one"
            )
        sparse = range(options.start_layer, dense.num_layers, options.layer_step)
        return [count if layer in sparse else 0 for layer in range(dense.num_layers)]
    if options.start_layer or options.layer_step != 1:
        raise UserError(
            f"--start-layer ({options.start_layer}) and --layer-step ({options.layer_step}) have no effect beside "
            "--experts-per-layer, which names every layer; leave them out"
        )
    if len(given) != dense.num_layers or not any(given):
        raise UserError(
            f"--experts-per-layer names {len(given)} layers, {sum(map(bool, given))} with experts, the model has "
            f"{dense.num_layers}; give a number for each, 0 where the FFN stays, and not for all"
        )
    return list(given)


def moe_config(dense: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """The configuration of the upcycled model; UserError if it cannot be made."""
    if dense.moe is not None:
        raise UserError(f"the model has {dense.moe.num_experts} experts per layer already; upcycle takes a dense model")
    if dense.mlp_bias:
        raise UserError("the FFNs have biases (mlp_bias is true), which experts have not; upcycle takes FFNs without")
    size, width = options.granularity, dense.intermediate_size
    each = _experts_per_layer(dense, options)
    experts = [count for count in each if count]
    named = "--num-experts" if options.num_experts is not None else "--experts-per-layer"
    wanted = [("the FFN width", width), *((named, count) for count in experts), ("--top-k", options.top_k)]
    for name, value in wanted:
        if value % size:
            raise UserError(
                f"--granularity ({size}) must divide {name} ({value}), so that tokens choose whole groups of slices; "
                "correct one"
            )
    given = options.gate_hidden_size
    needs_inside = options.gate in ("mlp_gelu", "cosine")
    if given and not needs_inside:
        raise UserError(f"--gate-hidden-size ({given}) has no effect on --gate {options.gate}; leave it out")
    if options.gate_init == "zero" and options.gate == "cosine":
        raise UserError(
            "--gate-init zero is not for --gate cosine: nothing has no direction; its logits are at most 1 at first"
        )
    renormalised = options.score != "softmax"
    if renormalised and options.scale != "w_down":
        raise UserError(
            f"--scale {options.scale} has no effect on --score {options.score}, whose weights add up to 1; leave it out"
        )
    try:
        moe = MoEConfig(
            num_experts=max(experts),
            experts_of_layer=experts if len(set(experts)) > 1 else None,
            top_k=options.top_k,
            expert_hidden_size=width // size,
            gate=options.gate,
            gate_hidden_size=(given or 256) if needs_inside else 0,
            score=options.score,
            renormalise=options.score == "sigmoid",  # as in DeepSeek-V3, arXiv:2412.19437 eq. 13
            score_scale=float(size) if renormalised else 1.0,
            residual_experts=int(options.residual),
            residual_hidden_size=width if options.residual else 0,
        )
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None
    changed: dict[str, Any] = {
        "moe": moe,
        "family": None,
        "dense_layers": {layer: width for layer, count in enumerate(each) if not count},
        # As in LLaMA-MoE's config.json, to which it is exported: that of all experts.
        "intermediate_size": moe.num_experts * moe.expert_hidden_size + moe.residual_hidden_size,
    }
    return dense.model_copy(update=changed)
