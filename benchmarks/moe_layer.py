"""How fast is one MoE layer, and how much does it keep, beside transformers, a dense FFN and other engines?

    python -m benchmarks.moe_layer [--shapes quarter ...] [--json OUT]
        [--peers-python PYTHON] [--megatron-shim FILE]

Forward and backward, the router's own routing of random tokens (not forced to balance), T = 4096 tokens over all ranks.
Everything that runs on one rank uses two threads, ranks of a pair one each: the same two cores. Equal weights for us
and for transformers' Qwen2-MoE (its router and experts; we have no shared expert), whose outputs are compared before
they are timed. `dense`: a SwiGLU FFN of the same FLOPs. Other engines run in processes of their own, with their own
weights (benchmarks/peer_layers.py); one that is not installed is named and left out.

Activation memory: bytes that live at the end of the forward, and the largest sum of a forward and backward, as torch's
allocator reports them, less what was there before and less gradients of weights.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from benchmarks.ranks import Together, on_ranks, time_together
from benchmarks.timing import print_table, write_results
from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.shared_memory import SharedMemory
from ep_engine.transport import Collective, Link, Transport

TOKENS = 4096
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PEERS = ("deepspeed", "megatron")
_LARGEST = 8 << 30  # bytes; batched_mm copies an expert's weights for every copy of a token


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = {
    "quarter": Shape(512, 352, 60, 4),
    "qwen": Shape(2048, 1408, 60, 4),
    "llama-moe": Shape(4096, 1376, 8, 2),
    "deepseek": Shape(2048, 1408, 64, 6),
}


def our_layer(shape: Shape, transport: Transport | None = None) -> MoELayer:
    """This rank's part of a layer whose weights are the same on every number of ranks."""
    moe = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, expert_hidden_size=shape.width, gate="linear")
    layer = MoELayer(moe, shape.hidden, 0)
    if transport is not None:
        placement = Placement.contiguous(shape.experts, transport.size, 1)
        site = Site.of(placement, 0, placement.cut(transport.size), transport.rank)
        layer.join(site, Link(transport, Ledger(["node"] * transport.size), 0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * shape.hidden**-0.5)
        for parameter in layer.experts.parameters():
            parameter.zero_()
            for expert in range(shape.experts):
                weight = torch.randn(parameter.shape[1:], generator=generator) * shape.hidden**-0.5
                if expert in layer.site.experts_here():
                    parameter[layer.site.experts_here().index(expert)] = weight
    return layer


class RoutedPart(nn.Module):
    """Router and experts of transformers' block, called as the block calls them."""

    def __init__(self, layer: MoELayer, shape: Shape, implementation: str) -> None:
        super().__init__()
        config = Qwen2MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            shared_expert_intermediate_size=8,  # there, but not called
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        block = Qwen2MoeSparseMoeBlock(config)
        self.gate, self.experts = block.gate, block.experts
        with torch.no_grad():
            self.gate.weight.copy_(layer.router.w_in)
            self.experts.gate_up_proj.copy_(layer.experts.w_gate_up)
            self.experts.down_proj.copy_(layer.experts.w_down)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        _, weights_TK, ids_TK = self.gate(x_TD)
        y_TD: Tensor = self.experts(x_TD, ids_TK, weights_TK)
        return y_TD


class Dense(nn.Module):
    """A SwiGLU FFN in which every token costs what it costs in the MoE layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width * shape.top_k
        self.gate, self.up = (nn.Linear(shape.hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def forward_and_backward(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """One call of both; gradients of weights are dropped afterwards, by everyone."""
    leaf = x.clone().requires_grad_()

    def call() -> Tensor:
        output = module(leaf)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        y.backward(grad)
        for parameter in module.parameters():
            parameter.grad = None
        leaf.grad = None
        return y.detach()

    return call


def activation_bytes(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, int]:
    """`held` after the forward, `peak` over forward and backward: see the head of the file."""
    leaf = x.clone().requires_grad_()
    held = _peak(lambda: module(leaf), module, of_what_stays=True)
    return {"held": held, "peak": _peak(forward_and_backward(module, x, grad), module, of_what_stays=False)}


def _peak(call: Callable[[], object], module: nn.Module, *, of_what_stays: bool) -> int:
    gradients = {parameter.nbytes for parameter in module.parameters()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    changes = [
        event.nbytes()
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        if event.name() == "[memory]" and abs(event.nbytes()) not in gradients
    ]
    total = largest = 0
    for change in changes:
        total += change
        largest = max(largest, total)
    del kept
    return total if of_what_stays else largest


def measure(rank: int, shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    """Everything that this process can time, on this rank and the others together."""
    world, size = dist.group.WORLD, dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, shape.hidden, generator=generator) for _ in range(2))
    mine = slice(rank * tokens // size, (rank + 1) * tokens // size)
    calls: dict[str, Together] = {}
    memory: dict[str, dict[str, int]] = {}
    left_out: list[str] = []
    if rank == 0:
        alone = our_layer(shape)
        modules: dict[str, nn.Module] = {"ours ep1": alone, "dense": Dense(shape)}
        for name in IMPLEMENTATIONS:
            if name == "batched_mm" and tokens * shape.top_k * alone.experts.w_gate_up[0].nbytes * 1.5 > _LARGEST:
                left_out.append("transformers batched_mm: would copy more than 8 GiB of weights")
            else:
                modules[f"transformers {name}"] = RoutedPart(alone, shape, name)
        expected = forward_and_backward(alone, x, grad)()
        for name, module in modules.items():
            calls[name] = Together(forward_and_backward(module, x, grad), alone=True, threads=2)
            if name != "dense":
                torch.testing.assert_close(calls[name].call(), expected, rtol=1e-3, atol=1e-3, msg=name)
                memory[name] = activation_bytes(module, x, grad)
    names = [list(calls)]
    dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        calls.setdefault(name, Together(lambda: None, alone=True, threads=2))
    if size > 1:
        for name, transport in (("collective", Collective(world)), ("shared_memory", SharedMemory(world, 60.0))):
            layer = our_layer(shape, transport)
            calls[f"ours ep{size} {name}"] = Together(forward_and_backward(layer, x[mine], grad[mine]))
    found = time_together(calls, rounds=rounds)
    return {"times": found, "activation_bytes": memory, "left_out": left_out}


def peer_time(name: str, shape: Shape, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the peer's own process says."""
    line = [args.peers_python, "-m", "benchmarks.peer_layers", "--peer", name, "--ep", str(ranks)]
    sizes = {"tokens": args.tokens, "hidden": shape.hidden, "width": shape.width, "experts": shape.experts}
    for key, value in {**sizes, "top-k": shape.top_k, "rounds": args.rounds}.items():
        line += [f"--{key}", str(value)]
    if args.megatron_shim:
        line += ["--megatron-shim", str(args.megatron_shim)]
    if shutil.which(args.peers_python) is None:
        return {"peer": name, "left_out": f"there is no {args.peers_python}"}
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        answer = {"peer": name, "left_out": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    return answer


def ratios_of(times: dict[str, dict[str, float]], memory: dict[str, dict[str, int]]) -> dict[str, float]:
    """The named ratios, above 1 where we are faster; memory below 1 where we keep less."""
    ms = {name: found["median_ms"] for name, found in times.items()}
    theirs = {name: t for name, t in ms.items() if name.startswith("transformers")}
    best = min(theirs, key=lambda name: theirs[name])
    ratios = {
        "vs_dense_gemm": ms["dense"] / ms["ours ep1"],
        "vs_transformers_best": ms[best] / ms["ours ep1"],
        "vs_transformers_eager": ms["transformers eager"] / ms["ours ep1"],
        "peak_activation_vs_transformers_best": memory["ours ep1"]["peak"] / memory[best]["peak"],
        "held_activation_vs_transformers_best": memory["ours ep1"]["held"] / memory[best]["held"],
    }
    if "ours ep2 shared_memory" in ms:
        ratios["ep2_shared_memory_vs_ep1"] = ms["ours ep1"] / ms["ours ep2 shared_memory"]
        peers = [t for name, t in ms.items() if name.endswith(" ep2") and not name.startswith("ours")]
        if peers:
            ratios["ep2_vs_best_peer"] = min(peers) / ms["ours ep2 shared_memory"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--ep", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the other engines")
    parser.add_argument("--megatron-shim", type=Path, help="a file that lets megatron-core run on CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, Any] = {}
    for name in args.shapes:
        shape = SHAPES[name]
        found: dict[str, Any] = {"times": {}, "activation_bytes": {}, "left_out": []}
        for ranks in args.ep or [1]:
            part = on_ranks(measure, shape, args.tokens, args.rounds, world_size=ranks)
            found["times"] |= {key: t for key, t in part["times"].items() if key not in found["times"]}
            found["activation_bytes"] |= part["activation_bytes"]
            found["left_out"] = part["left_out"]
        for peer in args.peers:
            answer = peer_time(peer, shape, 2, args)
            if "left_out" in answer:
                found["left_out"].append(f"{peer}: {answer['left_out']}")
            else:
                found["times"][f"{peer} ep2"] = {key: v for key, v in answer.items() if key.endswith("_ms")}
        found["ratios"] = ratios_of(found["times"], found["activation_bytes"])
        results[name] = found
        print_table(f"one MoE layer, {name} {shape}", found["times"], found["ratios"])
        print(*found["left_out"], sep="\n", file=sys.stderr)  # noqa: T201
    setting = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if key != "json"}
    write_results(args.json, "one MoE layer, forward and backward, float32", setting, results)


if __name__ == "__main__":
    main()
