"""Importance of neurons for the clusters of a corpus, from gradients (LLaMA-MoE, arXiv:2406.16554 eq. 8).

For every cluster one pass over its text: with h the input of w_down, or g the output of w_gate, and L the mean loss of
a row, every token gives the change h dL/dh, or the gradient dL/dh alone, and these are summed over tokens. Ranks share
the rows of a cluster; each has the whole model.

    OUT/<cluster>/layers.{i}.mlp.<projection>.weight.change    .grad for the gradient alone

Shape letters:  L layers   N neurons   B rows of a pass   S positions
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_tools.documents import rows_of_text
from checkpoint_tools.importance import FORMAT
from checkpoint_tools.kernels import KERNELS, Kernel
from checkpoint_tools.source import Source, open_source
from ep_engine.errors import UserError
from ep_engine.mesh import World, process_groups
from ep_engine.model import Decoder
from ep_engine.output import whole_folder
from ep_engine.parallelize import entries_of
from ep_engine.progress import bar

Level = Literal["sample", "total"]
Kind = Literal["change", "grad"]

_PROJECTIONS = ("up_proj", "gate_proj")


@dataclass(frozen=True)
class GradientOptions:
    """What is summed."""

    kernel: Kernel = "l1_norm"  # of each token, or of the sum: as it is, absolute, squared
    level: Level = "sample"  # kernel of each token and then the sum, or the sum over all tokens and then the kernel
    kind: Kind = "change"  # h dL/dh, how much the loss would change without the neuron; or dL/dh
    sequence_length: int = 2048  # S
    max_tokens: int = 1 << 17  # of a cluster
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation


def run_importance(
    folder: Path,
    clusters: Path,
    out: Path,
    options: GradientOptions,
    *,
    timeout_s: float = 300.0,
    overwrite: bool = False,
) -> dict[str, int] | None:
    """`gradient_importance` on all ranks that torchrun has started; None on others than the first.

    Raises:
        UserError: as `gradient_importance`.
    """
    world = World.from_environment()
    source = open_source(folder)
    device = world.pick_device("auto")
    names = len(_clusters(source, clusters))
    joined = process_groups(world, device, 1, timeout_s, settings=asdict(options))
    with joined as meshes, bar("clusters", names, show=world.rank == 0) as advance:
        tokens = gradient_importance(
            source, clusters, out, options, group=meshes.world, device=device, overwrite=overwrite, advance=advance
        )
    return tokens if world.rank == 0 else None


def gradient_importance(
    source: Source,
    clusters: Path,
    out: Path,
    options: GradientOptions,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, int]:
    """Write the importance files of every cluster.

    Args:
        source: a dense model with a tokenizer.
        clusters: folder of `.jsonl` files, a cluster each.
        out: folder to write, by the first rank.
        options: what is summed.
        group: the ranks that share the rows; None: this process alone.
        device: of the computation; None: the CPU.
        overwrite: replace `out` if it is a non-empty folder.
        advance: called with the number of clusters done.

    Returns:
        Tokens of every cluster.

    Raises:
        UserError: the model is a MoE or has no tokenizer, a cluster has less text than a row for each rank, or the
            folder has no clusters.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    limits = options.sequence_length, options.max_tokens
    rows_of = {file.stem: rows_of_text([source], [file], *limits) for file in _clusters(source, clusters)}
    for name, rows in rows_of.items():
        if len(rows) < size:
            raise UserError(
                f"cluster {name} in {clusters} has {len(rows)} rows of {options.sequence_length} tokens, there must be "
                f"one for each of {size} ranks; give more text, or a smaller --sequence-length"
            )
    model = _model(source, getattr(torch, options.dtype), device or torch.device("cpu"))
    with ExitStack() as made:
        draft = made.enter_context(whole_folder(out, overwrite=overwrite)) if rank == 0 else None
        for number, (name, rows) in enumerate(rows_of.items()):
            usable = rows[: len(rows) // size * size]
            sums = _Sums(model, options)
            for row in usable[rank::size]:
                sums.add(row.to(device or torch.device("cpu")))
            found = sums.result(len(usable) * (options.sequence_length - 1), group)
            if draft is not None:
                (draft / name).mkdir()
                for (projection, layer), value_N in found.items():
                    torch.save(value_N, draft / name / FORMAT.format(layer, projection, options.kind))
            advance(number + 1)
    return {name: len(rows) // size * size * options.sequence_length for name, rows in rows_of.items()}


class _Sums:
    """Of one cluster: what has gone through the neurons of every layer, (N,) float32 each."""

    def __init__(self, model: Decoder, options: GradientOptions) -> None:
        self._model, self._options = model, options
        width, layers = model.config.intermediate_size, model.config.num_layers
        at = next(model.parameters()).device
        self._sum = {(p, i): torch.zeros(width, device=at) for p in _PROJECTIONS for i in range(layers)}

    def add(self, row_S: Tensor) -> None:
        """One row, with the gradients of its mean loss."""
        with ExitStack() as hooks:
            for i, layer in self._model.decoder_layers().items():
                of_h = layer.ffn.w_down.register_forward_pre_hook(
                    lambda _m, given, i=i: self._follow("up_proj", i, given[0])
                )
                of_g = layer.ffn.w_gate.register_forward_hook(
                    lambda _m, _g, out, i=i: self._follow("gate_proj", i, out)
                )
                hooks.callback(of_h.remove)
                hooks.callback(of_g.remove)
            logits = self._model(row_S.unsqueeze(0))[0, :-1]
            F.cross_entropy(logits.float(), row_S[1:]).backward()

    def _follow(self, projection: str, layer: int, value: Tensor) -> None:
        """Add what the gradient says when it comes."""

        def seen(gradient: Tensor) -> None:
            told = gradient.float() * (value.detach().float() if self._options.kind == "change" else 1.0)
            told_TN = told.flatten(0, -2)
            if self._options.level == "sample":
                told_TN = KERNELS[self._options.kernel](told_TN)
            self._sum[projection, layer] += told_TN.sum(dim=0)

        value.register_hook(seen)

    def result(self, count: int, group: dist.ProcessGroup | None) -> dict[tuple[str, int], Tensor]:
        """Per target token, over all ranks, on the CPU."""
        for value_N in self._sum.values():
            if group is not None:
                dist.all_reduce(value_N, group=group)
            if self._options.level == "total":
                value_N.copy_(KERNELS[self._options.kernel](value_N))
            value_N /= count
        return {key: value_N.cpu() for key, value_N in self._sum.items()}


def _clusters(source: Source, folder: Path) -> list[Path]:
    if source.config.moe is not None:
        raise UserError(f"{source.folder} has experts already; importance is of a dense model's neurons")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"--clusters {folder} holds no .jsonl file; make them with `cluster`")
    return files


def _model(source: Source, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The whole model on this rank; only what flows through it has gradients."""
    model = Decoder(source.config).to(dtype)
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    model.to(device).requires_grad_(False)
    embed = model.embed
    assert embed is not None, "a whole model has one"
    embed.register_forward_hook(_with_gradient)
    return model


def _with_gradient(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
    return out.requires_grad_()
