"""Joins a model and the meshes: layers over pp, experts over ep, the rest over tp and dp, copies of experts over edp.

The model is single-device code and stays so; this file gives its MoE layers their site and transport, splits its
matrices with DTensor, and shards its weights with FSDP2.

With tp > 1 the residual stream is split along the sequence (arXiv:2205.05198): a rank norms, routes and dispatches its
own part of every row. What does so has whole weights and gradients from tokens of its own, so it is sharded over all
ranks of its stage, like the weights of a data-parallel model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ep_engine.config import MoESection
from ep_engine.entries import Shard, module_entries
from ep_engine.experts import Experts
from ep_engine.feed_forward import ResidualGate, SharedGate
from ep_engine.ledger import Ledger
from ep_engine.mesh import Meshes
from ep_engine.message import Message
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig
from ep_engine.norm import RMSNorm
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.stages import Stages
from ep_engine.transports.connect import Connection, connect

_DEFAULT = MoESection()
# With tp > 1 whole on every rank of a stage, though its tokens or its heads are only a part.
_ALONE = (RMSNorm, SharedGate, ResidualGate)


def build(
    config: ModelConfig,
    placement: Placement | None,
    meshes: Meshes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    travel: MoESection = _DEFAULT,
    reshard_after_forward: bool = False,
    tokens: int = 0,
    stages: Stages | None = None,
) -> tuple[list[Decoder], Ledger]:
    """Make this rank's part of a model, its weights not yet set.

    Gradients are summed, not averaged, over ranks: divide the loss by the number of tokens of all ranks.

    Args:
        config: the model.
        placement: of its experts; its tree must have the expert-parallel size as a cut. None for a dense model.
        meshes: the ranks.
        device: where weights live.
        dtype: of computation; weights and gradient sums are float32. The router computes in float32 regardless.
        travel: how tokens travel to their experts; its placement is not read.
        reshard_after_forward: gather weights again for the backward instead of keeping them.
        tokens: the most that a rank has in one pass; transport cuda_ipc needs to know.
        stages: of the pipeline; None: every rank has all layers.

    Returns:
        The stages of this rank, ascending, and the ledger in which their layers write.
    """
    etp = meshes.experts["etp"].size()
    ledger = Ledger(meshes.ep_tiers())
    connection = None
    if not config.is_dense:
        assert placement is not None, "a MoE model has a placement"
        cut = placement.cut(meshes.experts["ep"].size())
        connection = connect(
            travel.transport,
            meshes,
            device,
            cut.in_parts(etp),
            one_hop=travel.fixed_rows is not None,
            largest_exchange=largest_exchange(config, travel, tokens, meshes.dispatch.size(), etp),
        )
    layout = stages or Stages.of(config.num_layers, 1, "1f1b")
    models = []
    for number in layout.on(meshes.dense["pp"].get_local_rank()):
        with torch.device("meta"):
            model = Decoder(config, layout.layers[number])
            if connection is not None and placement is not None:
                _join_ranks(model, placement, meshes, connection, ledger, travel)
        if meshes.dense["tp"].size() > 1:
            _split(model, meshes.dense["tp"])
        _shard(model, meshes, dtype, reshard_after_forward)
        models.append(model.to_empty(device=device))
    return models, ledger


def _join_ranks(
    model: Decoder,
    placement: Placement,
    meshes: Meshes,
    connection: Connection,
    ledger: Ledger,
    travel: MoESection,
) -> None:
    """Make the MoE layers parts of their group."""
    ep_size, rank = meshes.experts["ep"].size(), dist.get_rank(meshes.dispatch)
    per_copy, parts = travel.combine == "per_expert", meshes.experts["etp"].size()
    for i, moe in model.moe_layers().items():
        site = Site.of(placement, model.config.moe_index(i), ep_size, rank, one_row_per_copy=per_copy, parts=parts)
        moe.join(site, *connection.links(ledger, i), fp8=travel.fp8_dispatch, fixed_rows=travel.fixed_rows)


def largest_exchange(config: ModelConfig, travel: MoESection, tokens: int, num_ranks: int, parts: int) -> int:
    """Bytes that a rank is sent if all tokens of its group come to it."""
    assert config.moe is not None, "the caller has asked"
    rows_of_token = config.moe.top_k if travel.combine == "per_expert" else 1
    message = Message(config.hidden_size, torch.float32, 2 * config.moe.top_k * parts)
    return num_ranks * max(tokens, travel.fixed_rows or 0) * rows_of_token * message.num_bytes


def _split(model: Decoder, tp: DeviceMesh) -> None:
    """Megatron's tensor and sequence parallelism (arXiv:1909.08053, arXiv:2205.05198), vocabulary included."""
    sequence, whole = Split(1), Replicate()
    plan: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=whole, output_layouts=sequence)
    if model.is_last:
        plan["unembed"] = PrepareModuleInput(input_layouts=(sequence, None), desired_input_layouts=(whole, None))
    for i, layer in model.decoder_layers().items():
        at = f"layers.{i}.attention"
        plan[at] = PrepareModuleInput(input_layouts=(sequence, None), desired_input_layouts=(whole, None))
        plan |= {f"{at}.{name}": ColwiseParallel() for name in ("w_q", "w_k", "w_v")}
        plan[f"{at}.w_o"] = RowwiseParallel(output_layouts=sequence)
        if not layer.is_moe and layer.has_ffn:
            plan |= _split_ffn(f"layers.{i}.ffn", sequence)
            width = model.config.dense_size(i) // tp.size()
            layer.ffn.keep_channels(tp.get_local_rank() * width, width)
            if layer.ffn.shared_gate is not None:
                layer.ffn.shared_gate.register_forward_pre_hook(_to_partial)
        elif layer.is_moe:
            beside = ["shared"] if layer.moe.shared is not None else []
            if layer.moe.residual is not None:
                beside += [f"residual.each.{n}" for n in range(len(layer.moe.residual.each))]
            for name in beside:
                plan |= _split_ffn(f"layers.{i}.moe.{name}", Split(0))  # of tokens, in whatever order
    parallelize_module(model, tp, plan)
    if model.is_last and model.head is not None:
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight, tp, [Split(0)]))


def _to_partial(_module: nn.Module, given: tuple[DTensor]) -> tuple[torch.Tensor]:
    """All of the sequence, whose gradient is summed over ranks: each has that of its channels."""
    return (given[0].to_local(grad_placements=[Partial()]),)


def _split_ffn(at: str, tokens: Split) -> dict[str, ParallelStyle]:
    return {
        at: PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
        **{f"{at}.{name}": ColwiseParallel() for name in ("w_gate", "w_up")},
        f"{at}.w_down": RowwiseParallel(output_layouts=tokens),
    }


def _shard(model: Decoder, meshes: Meshes, dtype: torch.dtype, reshard: bool) -> None:
    """FSDP2, but for float32 weights that one rank holds alone: it would keep a copy of them and of their gradients."""
    compute = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Rows come in the dtype of computation, and their weights are to stay in float32.
    uncast = replace(compute, cast_forward_inputs=False)
    # By itself: cast with the rest of its layer, the router's weights would be rounded.
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    split = meshes.dense["tp"].size() > 1
    left: set[nn.Parameter] = set()

    def shard(
        module: nn.Module,
        mesh: DeviceMesh,
        policy: MixedPrecisionPolicy,
        split_dim: Callable[[nn.Parameter], Split] | None = None,
    ) -> None:
        if mesh.size() == 1 and policy.param_dtype == torch.float32:
            left.update(module.parameters())
            return
        options: dict[str, Any] = {"reshard_after_forward": reshard, "ignored_params": left}
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=split_dim, **options)

    edp = meshes.experts["edp"]
    for moe in model.moe_layers().values():
        shard(moe.experts, edp, uncast, _split_dim(moe.experts, edp.size()))
        if dtype != torch.float32 or split:
            shard(moe.router, meshes.stage, exact)
    if split:
        for alone in (module for module in model.modules() if isinstance(module, _ALONE)):
            shard(alone, meshes.stage, compute)
    for layer in model.decoder_layers().values():
        shard(layer, meshes.dense["dp"], compute)
    if meshes.stage.size() > 1 or dtype != torch.float32:  # else there is nothing that a root would have to look after
        left = left if meshes.dense["dp"].size() > 1 or dtype != torch.float32 else set(model.parameters())
        fully_shard(model, mesh=meshes.dense["dp"], mp_policy=compute, reshard_after_forward=False, ignored_params=left)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Plain sums: any other factor needs a reduction that gloo has not.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def slices_experts(num_slots: int, hidden_size: int, copies: int) -> bool:
    """Whether each of the ranks with the same experts keeps a slice of all, along the model's width.

    Else they share whole experts out, which FSDP2 pads to the same number for each: where there are fewer experts than
    ranks, most would hold and gather padding.
    """
    return num_slots < copies and hidden_size % copies == 0


def _split_dim(experts: Experts, copies: int) -> Callable[[nn.Parameter], Split] | None:
    """The dim along which FSDP2 splits the weights of experts over their copies; None: the first."""
    w_gate_up = experts.w_gate_up
    if not slices_experts(w_gate_up.shape[0], w_gate_up.shape[2], copies):
        return None
    return lambda weight: Split(2 if weight is w_gate_up else 1)


def entries_of(
    stages: Sequence[Decoder],
    tensors: dict[str, DTensor] | None = None,
    prefix: str = "",
    *,
    experts: DeviceMesh | None = None,
) -> dict[str, Shard]:
    """Checkpoint entries of this rank's weights, or of tensors that lie as they do (moments), under `prefix`.

    `experts` is the mesh of the experts; None: they are whole.
    """
    named = dict(named_parameters(stages)) if tensors is None else tensors
    moes = {i: moe for stage in stages for i, moe in stage.moe_layers().items()}
    expert_ids = {f"{prefix}layers.{i}.moe.experts": moe.site.experts_here() for i, moe in moes.items()}
    entries = module_entries(((prefix + name, tensor) for name, tensor in named.items()), expert_ids, experts)
    for name in (prefix + copy for stage in stages for copy in stage.copies):
        if name in entries:  # what is frozen has no moments
            entries[name] = replace(entries[name], is_copy=True)
    return entries


def named_parameters(stages: Sequence[Decoder]) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of this rank, under their names in the whole model."""
    for stage in stages:
        yield from stage.named_parameters()
