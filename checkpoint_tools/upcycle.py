"""Dense model to mixture of experts by copying (sparse upcycling, arXiv:2212.05055), the same function at step 0.

Every FFN becomes E experts. With granularity G it is first cut into G slices of its hidden width, and a group is one of
each (virtual groups, arXiv:2410.07524): expert r * G + i is slice i in group r. The router's rows are equal within a
group, so a token chooses whole groups, each expert with 1 / G of its group's weight, which a factor G on the combine
weights undoes: with weights that add up to 1 the layer is the dense FFN, exactly.

Shapes: N hidden width of the FFN, D model dim, E experts, F = N / G, R = E / G groups.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from checkpoint_tools.source import check_apart, open_source
from checkpoint_tools.split import check_identity, new_gate
from ep_engine.checkpoint import write_model
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, first_sentence
from ep_engine.output import check_output_folder
from ep_engine.progress import track

_WEIGHTS = ("w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class UpcycleOptions:
    """How a dense model becomes a mixture of experts."""

    num_experts: int
    top_k: int
    granularity: int = 1
    seed: int = 0
    gate: str = "linear"  # or `mlp`


def upcycle(source: Path, out: Path, options: UpcycleOptions, *, overwrite: bool = False) -> ModelConfig:
    """Copy every FFN into experts and write an engine checkpoint.

    Experts are views of the dense weights until they are written, one by one.

    Args:
        source: dense Hugging Face folder or engine checkpoint.
        out: checkpoint to write.
        options: granularity divides the FFN width, num_experts and top_k.
        overwrite: replace `out` if it is a non-empty folder.

    Raises:
        UserError: the model is a MoE already or has FFN biases, the sizes do not fit, or `out` exists.
        Fault: the slices of a group together are not the dense FFN.
    """
    check_apart(source, out)
    check_output_folder(out, overwrite=overwrite)
    model = open_source(source)
    config = _moe_config(model.config, options)
    width, size = model.config.intermediate_size, options.granularity
    slices = np.array_split(np.arange(width), size)
    tensors = {name: tensor for name, tensor in model.tensors.items() if ".ffn." not in name}
    for layer in track(range(config.num_layers), "copying layers"):
        ffn = {name: model.tensors[f"layers.{layer}.ffn.{name}.weight"] for name in _WEIGHTS}
        parts = [_slice(ffn, int(neurons[0]), len(neurons)) for neurons in slices]
        check_identity(ffn, parts, slices, layer)
        at = f"layers.{layer}.moe"
        for expert in range(options.num_experts):
            tensors |= {f"{at}.experts.{expert}.{name}": w for name, w in parts[expert % size].items()}
        gate = new_gate(config, options.num_experts, options.gate, options.seed, layer, ffn["w_gate"].dtype)
        last = "w_out" if options.gate == "mlp" else "w_in"  # whose rows are the logits'
        gate[last] = gate[last][: options.num_experts // size].repeat_interleave(size, dim=0)
        tensors |= {f"{at}.router.{name}": w for name, w in gate.items()}
    write_model(out, config, tensors, source=source, overwrite=overwrite)
    return config


def _slice(ffn: dict[str, Tensor], first: int, size: int) -> dict[str, Tensor]:
    return {name: w.narrow(1 if name == "w_down" else 0, first, size) for name, w in ffn.items()}


def _moe_config(dense: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """The configuration of the upcycled model; UserError if it cannot be made."""
    if dense.moe is not None:
        raise UserError(f"the model has {dense.moe.num_experts} experts per layer already; upcycle takes a dense model")
    if dense.mlp_bias:
        raise UserError("the FFNs have biases (mlp_bias is true), which experts have not; upcycle takes FFNs without")
    size = options.granularity
    wanted: dict[str, Any] = {
        "the FFN width": dense.intermediate_size,
        "--num-experts": options.num_experts,
        "--top-k": options.top_k,
    }
    for name, value in wanted.items():
        if value % size:
            raise UserError(
                f"--granularity ({size}) must divide {name} ({value}), so that tokens choose whole groups of slices; "
                "correct one"
            )
    try:
        moe = MoEConfig(
            num_experts=options.num_experts,
            top_k=options.top_k,
            expert_hidden_size=dense.intermediate_size // size,
            gate=options.gate,  # type: ignore[arg-type]  # pydantic checks it
            score_scale=float(size),
        )
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None
    # As in LLaMA-MoE's config.json, to which it is exported: that of all experts.
    total = moe.num_experts * moe.expert_hidden_size
    return dense.model_copy(update={"moe": moe, "intermediate_size": total})
