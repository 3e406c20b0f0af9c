"""Score scales by layer: the experts of a layer add as much to its residual stream as the dense FFN did (LLaMA-MoE).

With gap = mean |residual|_1 / mean |FFN output|_1 over tokens, a layer's factor is its gap with factor 1 over that of
the dense model; layers are set one after the other, each seeing what those below it give with theirs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint_tools.documents import rows_of_text
from checkpoint_tools.forward import attended, feed_forward
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Positions
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig
from ep_engine.output import whole_file


def calibrate(
    folder: Path, dense: Path, corpus: Sequence[Path], *, max_tokens: int = 4096, sequence_length: int = 512
) -> list[float]:
    """Set `score_scale` in the model.json of a checkpoint, a factor for each layer with experts, and return them.

    Args:
        folder: engine checkpoint of a split model.
        dense: what it was split from.
        corpus: documents.
        max_tokens: of the corpus.
        sequence_length: of a row.

    Raises:
        UserError: one of the two is not what it should be, neither has a tokenizer, or the corpus is too short.
    """
    moe, whole = open_source(folder), open_source(dense)
    if moe.kind != "engine" or moe.config.moe is None or whole.config.moe is not None:
        raise UserError(f"{folder} must be an engine checkpoint with experts, and {dense} a dense model; give such two")
    if moe.config.moe.learned_scale:
        raise UserError(f"{folder} has factors that are weights (add_weight_norm), which no calibration sets; train it")
    if whole.config.num_layers != moe.config.num_layers or whole.config.hidden_size != moe.config.hidden_size:
        raise UserError(
            f"{folder} has {moe.config.num_layers} layers of width {moe.config.hidden_size}, {dense} "
            f"{whole.config.num_layers} of {whole.config.hidden_size}; give what it was split from"
        )
    rows = torch.stack(rows_of_text([moe, whole], corpus, sequence_length, max_tokens))
    scales = score_scales(moe, whole, rows)
    made = moe.config.moe.model_copy(update={"score_scale": scales})
    config = ModelConfig.model_validate(moe.config.model_copy(update={"moe": made}).model_dump())
    with whole_file(folder / "model.json") as beside:
        beside.write_text(config.model_dump_json(indent=1))
    return scales


@torch.no_grad()
def score_scales(moe: Source, dense: Source, rows_BS: Tensor) -> list[float]:
    """A factor for each layer with experts; ids (B, S)."""
    assert moe.config.moe is not None, "the caller has asked"
    unscaled = moe.config.moe.model_copy(update={"score_scale": 1.0})
    states = {"moe": F.embedding(rows_BS, moe.tensors["embed.weight"]).float(),
              "dense": F.embedding(rows_BS, dense.tensors["embed.weight"]).float()}  # fmt: skip
    positions = Positions(moe.config)
    scales = []
    for layer in range(moe.config.num_layers):
        outputs = {}
        for name, model in (("moe", moe), ("dense", dense)):
            config = model.config.model_copy(update={"moe": unscaled}) if name == "moe" else model.config
            states[name] = attended(states[name], config, model.tensors, positions, layer)
            outputs[name] = feed_forward(states[name], config, model.tensors, layer)
        factor = 1.0
        if moe.config.moe_of(layer) is not None:
            gap = {name: float(states[name].abs().mean()) / float(outputs[name].abs().mean()) for name in outputs}
            factor = gap["moe"] / gap["dense"]
            scales.append(factor)
        states["moe"] = states["moe"] + factor * outputs["moe"]
        states["dense"] = states["dense"] + outputs["dense"]
    return scales
