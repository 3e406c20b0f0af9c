"""Entries of a checkpoint: their names and shapes, and the parts of them that a rank's tensors are.

A module stacks the experts of its rank, `layers.0.moe.experts.w_down` (L, D, F); on disk each is an entry of its own,
`layers.0.moe.experts.5.w_down` (D, F), under its logical id, so any expert-parallel size and any placement can read it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ep_engine.model_config import ModelConfig, MoEConfig


def expected_entries(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight a checkpoint of this model holds."""
    d, v = config.hidden_size, config.vocab_size
    entries: dict[str, tuple[int, ...]] = {"embed.weight": (v, d)}
    for i in range(config.num_layers):
        at = f"layers.{i}"
        moe, width = config.moe_of(i), config.dense_size(i)
        entries |= {f"{at}.attention_norm.weight": (d,)}
        if moe is not None or width:
            entries |= {f"{at}.ffn_norm.weight": (d,)}
        entries |= _attention_entries(f"{at}.attention", config)
        if i in config.condensed and config.condensed[i].gated:
            entries |= {f"{at}.ffn.shared_gate.weight": (1, d)}
        if moe is None and width:
            entries |= _linears(f"{at}.ffn", _ffn_shapes(d, width), bias=config.mlp_bias)
        elif moe is not None:
            entries |= _moe_entries(f"{at}.moe", moe, d)
    entries["norm.weight"] = (d,)
    if not config.tie_embeddings:
        entries["head.weight"] = (config.head_size, d)
    return entries


def _ffn_shapes(d: int, f: int) -> dict[str, tuple[int, int]]:
    return {"w_gate": (f, d), "w_up": (f, d), "w_down": (d, f)}


def _attention_entries(at: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    entries = _linears(at, {"w_q": (q, d), "w_k": (kv, d), "w_v": (kv, d)}, bias=bool(config.attention_bias))
    entries |= _linears(at, {"w_o": (d, q)}, bias=config.attention_bias is True)
    if config.qk_norm is not None:
        each = config.qk_norm == "head"
        entries[f"{at}.q_norm.weight"] = (config.head_dim if each else q,)
        entries[f"{at}.k_norm.weight"] = (config.head_dim if each else kv,)
    return entries


def _moe_entries(at: str, moe: MoEConfig, d: int) -> dict[str, tuple[int, ...]]:
    e, f, inside = moe.num_experts, moe.expert_hidden_size, moe.gate_hidden_size or moe.num_experts
    entries: dict[str, tuple[int, ...]] = {f"{at}.router.w_in": (inside, d)}
    if moe.gate != "linear":
        entries[f"{at}.router.w_out"] = (e, inside)
    if moe.gate == "mlp_gelu":
        entries[f"{at}.router.b_in"] = (inside,)
    if moe.gate == "cosine":
        entries[f"{at}.router.temperature"] = (1,)
    if moe.gate_noise:
        entries[f"{at}.router.w_noise"] = (e, d)
    if moe.learned_scale:
        entries[f"{at}.router.scale"] = (1,)
    if moe.selection_bias:
        entries[f"{at}.router.bias"] = (e,)
    if moe.shared_hidden_size:
        entries |= _linears(f"{at}.shared", _ffn_shapes(d, moe.shared_hidden_size), bias=False)
    if moe.shared_gate:
        entries[f"{at}.shared_gate.weight"] = (1, d)
    if moe.residual_experts:
        entries[f"{at}.residual.gate.weight"] = (moe.residual_experts, d)
    if moe.residual_weighting:
        entries[f"{at}.residual_weighting.weight"] = (2, d)
    for expert in range(moe.residual_experts):
        entries |= _linears(f"{at}.residual.each.{expert}", _ffn_shapes(d, moe.residual_hidden_size), bias=False)
    for expert in range(e):
        entries |= {f"{at}.experts.{expert}.{name}": shape for name, shape in _ffn_shapes(d, f).items()}
    return entries


def _linears(at: str, shapes: Mapping[str, tuple[int, int]], *, bias: bool) -> dict[str, tuple[int, ...]]:
    entries: dict[str, tuple[int, ...]] = {f"{at}.{name}.weight": shape for name, shape in shapes.items()}
    return entries | ({f"{at}.{name}.bias": shape[:1] for name, shape in shapes.items()} if bias else {})


@dataclass(frozen=True)
class Shard:
    """The part of one entry that this rank holds."""

    tensor: Tensor  # a view of the parameter's local memory: a load writes straight into it
    saved: Tensor  # what torch.distributed.checkpoint is given: the DTensor, or the same view
    first: int  # position of its first element in the whole entry
    pitch: int | None = None  # where it is parts of the rows of the entry: elements from one row to the next
    is_copy: bool = False  # other ranks hold the same, and one of them speaks for all


_STACKED = {"w_gate_up": ("w_gate", "w_up")}  # what a module stacks along the first dim of an expert


def module_entries(
    named: Iterable[tuple[str, Tensor]], expert_ids: Mapping[str, list[int]], experts: DeviceMesh | None = None
) -> dict[str, Shard]:
    """Map a module's tensors to checkpoint entries.

    Args:
        named: (name, tensor) pairs; a tensor may be a DTensor sharded along its first two dims, or, of experts, along
            the one that is the model's width: each rank then has a slice of all of them.
        expert_ids: for each `...experts` module, the logical expert id in each of its rows, -1 for an empty slot.
        experts: their mesh, whose axis etp splits each along its hidden width; None: experts are whole.
    """
    entries: dict[str, Shard] = {}
    for name, tensor in named:
        module, _, leaf = name.rpartition(".")
        tensor = tensor.detach()  # what is read or written here is no part of a graph
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if module in expert_ids:
            first_row = _offset(tensor)[0]
            sliced = isinstance(tensor, DTensor) and not tensor.placements[0].is_shard(0)
            for row in range(local.shape[0]):
                expert = expert_ids[module][first_row + row]
                if expert < 0:
                    continue
                parts = _STACKED.get(leaf, (leaf,))
                for part, of_expert in zip(parts, local[row].chunk(len(parts)), strict=True):
                    entries[f"{module}.{expert}.{part}"] = _expert_shard(part, of_expert, sliced, experts)
        else:
            entries[name] = _shard(tensor, local)
    return entries


def _expert_shard(name: str, local: Tensor, sliced: bool, experts: DeviceMesh | None) -> Shard:
    """A matrix of an expert, or what is here of it: of the model's width over edp, of its own over etp."""
    model_dim, own_dim = (0, 1) if name == "w_down" else (1, 0)
    dims = {"edp": model_dim} if sliced else {}
    if experts is not None and experts["etp"].size() > 1:
        dims["etp"] = own_dim
    if not dims:
        return Shard(local, local, 0)
    assert experts is not None, "experts in slices lie on a mesh"
    split = DTensor.from_local(local, experts[tuple(dims)], [Split(dim) for dim in dims.values()], run_check=False)
    return _shard(split, local)


def _shard(tensor: Tensor, local: Tensor) -> Shard:
    offset, size = _offset(tensor), tensor.shape
    is_copy = isinstance(tensor, DTensor) and any(
        placement.is_replicate() and tensor.device_mesh.get_local_rank(dim) > 0
        for dim, placement in enumerate(tensor.placements)
    )
    if tensor.ndim < 2:
        return Shard(local, tensor, offset[0], is_copy=is_copy)
    pitch = size[1] if local.shape[1] < size[1] else None
    return Shard(local, tensor, offset[0] * size[1] + offset[1], pitch, is_copy)


def _offset(tensor: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this rank's part begins."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset
