"""One MoE layer of another engine on CPU ranks, in a process of its own: what benchmarks/moe_layer.py asks for.

    python -m benchmarks.peer_layers --peer deepspeed --ep 2 --rounds 20
        --tokens 4096 --hidden 512 --width 352 --experts 60 --top-k 4

Forward and backward of T tokens over all ranks, SwiGLU experts, no token dropped, the peer's own weights and its
router's own routing: other numbers than ours, but the same tokens, sizes and top-k, so the same products. Prints one
line of JSON: the times, or why the peer is left out. A round takes as long as its slowest rank.

Peers are imported inside their functions, because importing one can change torch for the whole process.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ranks import Together, all_times, on_ranks


class SwiGLU(nn.Module):
    """One expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def deepspeed_layer(args: Namespace) -> tuple[nn.Module, str, str]:
    """deepspeed's MoE with capacity for the busiest expert, so that no token is dropped."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo", verbose=False)
    layer = MoE(
        args.hidden,
        SwiGLU(args.hidden, args.width),
        num_experts=args.experts,
        ep_size=args.ep,
        k=args.top_k,
        drop_tokens=False,
        use_rts=False,
        use_tutel=False,
    )
    layer.set_deepspeed_parallelism()
    return layer, deepspeed.__version__, "experts padded to the busiest one, dispatch by einsum"


def megatron_layer(args: Namespace) -> tuple[nn.Module, str, str]:
    """megatron-core's MoELayer with the all-to-all dispatcher, through a shim that stands in for CUDA."""
    if args.megatron_shim is None:
        raise ImportError("megatron-core needs --megatron-shim to run on CPU")
    spec = importlib.util.spec_from_file_location("megatron_shim", args.megatron_shim)
    assert spec is not None, "a path to a file"
    assert spec.loader is not None, "a path to a file"
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    shim.install()
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(expert_model_parallel_size=args.ep)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=8,
        ffn_hidden_size=args.width,
        moe_ffn_hidden_size=args.width,
        num_moe_experts=args.experts,
        moe_router_topk=args.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=args.ep,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
    )
    submodules = get_moe_module_spec(use_te=False, num_experts=args.experts, moe_grouped_gemm=False).submodules
    return MoELayer(config, submodules), megatron.core.__version__, "SequentialMLP, through a shim for CUDA"


def torchtitan_layer(args: Namespace) -> tuple[nn.Module, str, str]:
    """torchtitan's MoE with GroupedExperts behind its AllToAllTokenDispatcher."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    class Experts(GroupedExperts):
        """As torchtitan's, but in the dtype of the tokens: its own always computes in bfloat16."""

        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            offs = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
            gate_RF, up_RF = (self._grouped_mm(A=x_RD, B_t=w.mT, offs=offs) for w in (self.w1_EFD, self.w3_EFD))
            y_RD: Tensor = self._grouped_mm(A=F.silu(gate_RF) * up_RF, B_t=self.w2_EDF.mT, offs=offs)
            return y_RD

    set_spmd_backend("default")
    layer = MoE(
        MoE.Config(
            num_experts=args.experts,
            routed_experts=RoutedExperts.Config(
                inner_experts=Experts.Config(
                    dim=args.hidden, hidden_dim=args.width, num_experts=args.experts // args.ep
                ),
                token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=args.experts, top_k=args.top_k),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=args.experts,
                gate=Linear.Config(in_features=args.hidden, out_features=args.experts),
                top_k=args.top_k,
                score_func="softmax",
                route_norm=True,
            ),
            load_balance_coeff=None,
        )
    )
    layer.routed_experts.token_dispatcher.wire_meshes(
        ep_mesh=init_device_mesh("cpu", (args.ep,), mesh_dim_names=("ep",))
    )
    with torch.no_grad():
        for parameter in layer.routed_experts.parameters():  # GroupedExperts leaves them uninitialised
            parameter.normal_(std=args.hidden**-0.5)
    return layer, version("torchtitan"), "AllToAllTokenDispatcher, grouped_mm in the dtype of the tokens"


LAYERS: dict[str, Callable[[Namespace], tuple[nn.Module, str, str]]] = {
    "deepspeed": deepspeed_layer,
    "torchtitan": torchtitan_layer,
    "megatron": megatron_layer,
}


def check_work(layer: nn.Module, leaf: Tensor, grad: Tensor) -> None:
    """Whether every token comes back changed, and gradients reach it and the weights: what is timed was done."""
    output = layer(leaf)
    y: Tensor = output[0] if isinstance(output, tuple) else output
    y.backward(grad)
    assert leaf.grad is not None, "it is a leaf of the graph"
    for what, rows in (("output", y.detach()), ("gradient", leaf.grad)):
        empty = int((rows.flatten(0, -2).abs().sum(dim=-1) == 0).sum())
        if empty or not rows.isfinite().all():
            raise RuntimeError(f"the {what} of {empty} tokens is zero, or some is not finite")
    if all(parameter.grad is None for parameter in layer.parameters()):  # some may be: an expert nobody chose
        raise RuntimeError("no weight has a gradient")
    leaf.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def measure(rank: int, args: Namespace) -> dict[str, Any]:
    """Time the layer on this rank and the others together."""
    torch.manual_seed(0)
    layer, release, notes = LAYERS[args.peer](args)
    torch.manual_seed(rank)
    tokens = args.tokens // dist.get_world_size()
    dtype = getattr(torch, args.dtype)
    layer.to(dtype)
    leaf = torch.randn(tokens, 1, args.hidden).to(dtype).requires_grad_()
    grad = torch.randn(tokens, 1, args.hidden).to(dtype)

    def call() -> None:
        output = layer(leaf)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        y.backward(grad)
        for parameter in layer.parameters():
            parameter.grad = None
        leaf.grad = None

    check_work(layer, leaf, grad)
    threads = max(1, 2 // args.ep)
    times = all_times({args.peer: Together(call, threads=threads)}, rounds=args.rounds)[args.peer]
    answer = {"peer": args.peer, "version": release, "notes": notes, "times_ms": times}
    if rank == 0:
        args.kept.write_text(json.dumps(answer))
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=LAYERS, required=True)
    for name in ("tokens", "hidden", "width", "experts", "top-k", "ep", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--megatron-shim", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.kept = Path(folder) / "measured.json"
        try:
            answer = on_ranks(measure, args, world_size=args.ep)
        except Exception as error:  # whatever a peer does, the comparison goes on and says so
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1][:200] if lines else type(error).__name__
            answer = {"peer": args.peer, "left_out": reason}
            if args.kept.exists():  # deepspeed now and then aborts when its process ends
                answer = json.loads(args.kept.read_text())
                answer["notes"] += f"; after it was measured: {reason}"
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    main()
