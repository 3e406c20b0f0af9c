"""How fast is one MoE layer, and how much does it keep, beside transformers, a dense FFN and other engines?

    python -m benchmarks.moe_layer [--shapes quarter ...] [--dtype bfloat16] [--json OUT]
        [--peers-python PYTHON] [--megatron-shim FILE]

Forward and backward, the router's own routing of random tokens (not forced to balance), T = 4096 tokens over all ranks.
Everything that runs on one rank uses two threads, ranks of a pair one each: the same two cores; four ranks share them
two by two. The same weights for us and for transformers' Qwen2-MoE (its router and experts; we have no shared expert),
whose outputs are compared before they are timed. `dense`: a SwiGLU FFN of the same FLOPs. All these take turns within a
round. Other engines run in processes of their own with their own weights (benchmarks/peer_layers.py); one that is not
installed or fails is named, with its reason, and left out. Ours and theirs take turns every few rounds, so that a
machine that slows down meets all.

Activation memory: bytes that live at the end of the forward (`held`), and the most that live during a forward and
backward (`peak`), beyond what was there before and without the gradients of weights that stay.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from benchmarks.ranks import Together, all_times, on_ranks, summary
from benchmarks.timing import print_table, write_results
from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.transports.shared_memory import SharedMemory
from ep_engine.transports.transport import Collective, Link, Transport

TOKENS = 4096
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # the others, deepgemm and sonicmoe, are kernels for GPUs
PEERS = ("deepspeed", "torchtitan", "megatron")
PEER_RANKS = 2
TRANSPORTS: dict[str, Callable[[dist.ProcessGroup], Transport]] = {
    "collective": Collective,
    "shared_memory": lambda group: SharedMemory(group, 60.0),
}
_LARGEST = 8 << 30  # bytes; batched_mm copies an expert's weights for every copy of a token
_PATIENCE = 3600  # seconds for a peer; one that lost a rank may wait for ever


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


def our_layer(shape: Shape, transport: Transport | None = None, dtype: torch.dtype = torch.float32) -> MoELayer:
    """This rank's part of a layer whose weights are the same on every number of ranks; the router stays float32."""
    moe = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, expert_hidden_size=shape.width, gate="linear")
    layer = MoELayer(moe, shape.hidden, 0)
    if transport is not None:
        placement = Placement.contiguous(shape.experts, transport.size, 1)
        site = Site.of(placement, 0, transport.size, transport.rank)
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
    layer.experts.to(dtype)
    return layer


class RoutedPart(nn.Module):
    """Router and experts of transformers' block, called as the block calls them, on the expert weights of our layer."""

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
        with torch.device("meta"):
            block = Qwen2MoeSparseMoeBlock(config)
        self.gate, self.experts = block.gate, block.experts
        self.experts.gate_up_proj, self.experts.down_proj = layer.experts.w_gate_up, layer.experts.w_down
        self.gate.weight = nn.Parameter(layer.router.w_in.detach().to(layer.experts.w_down.dtype))

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

    def forward() -> tuple[Tensor, ...]:
        output = module(leaf)  # all of it: what the layer returns beside y lives until the loss
        return output if isinstance(output, tuple) else (output,)

    def forward_backward() -> None:
        output = forward()
        output[0].backward(grad)

    held = list(_running_bytes(forward, module))[-1]
    return {"held": held, "peak": max(_running_bytes(forward_backward, module))}


def _running_bytes(call: Callable[[], object], module: nn.Module) -> Iterable[int]:
    """Bytes that live after each allocation and release of a call.

    The profiler's allocation events and not resident memory or an arithmetic of saved tensors: they are exact, and see
    temporaries. A gradient of a weight that stays is known by its address: its last allocation is left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    assert profiler.profiler is not None, "it has run"
    changes: list[tuple[int, int, int]] = []  # when, address, bytes (negative: released)
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    changes.sort(key=lambda change: change[0])
    gradients = {p.grad.untyped_storage().data_ptr() for p in module.parameters() if p.grad is not None}
    last_of_gradient = {ptr: i for i, (_, ptr, size) in enumerate(changes) if ptr in gradients and size > 0}
    left_out = set(last_of_gradient.values())
    del kept
    for parameter in module.parameters():
        parameter.grad = None
    return accumulate(size for i, (_, _, size) in enumerate(changes) if i not in left_out)


def check_outputs(name: str, y_TD: Tensor, expected_TD: Tensor) -> None:
    """Whether a candidate computes what we do.

    In bfloat16 its router rounds the logits, ours does not: some tokens then go to other experts, most must agree.
    """
    if y_TD.dtype == torch.float32:
        torch.testing.assert_close(y_TD, expected_TD, rtol=1e-3, atol=1e-3, msg=lambda found: f"{name}: {found}")
        return
    error_T = (y_TD.float() - expected_TD.float()).norm(dim=1) / expected_TD.float().norm(dim=1)
    agreeing = (error_T < 0.05).float().mean().item()
    if agreeing < 0.75:
        raise AssertionError(f"{name}: only {agreeing:.0%} of the tokens agree with ours")


def alone_candidates(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[dict[str, nn.Module], list[str]]:
    """What one rank runs by itself, and what is left out."""
    ours = our_layer(shape, dtype=dtype)
    modules: dict[str, nn.Module] = {"ours ep1": ours, "dense": Dense(shape).to(dtype)}
    left_out = []
    for name in IMPLEMENTATIONS:
        copied = tokens * shape.top_k * (ours.experts.w_gate_up[0].nbytes + ours.experts.w_down[0].nbytes)
        if name == "batched_mm" and copied > _LARGEST:
            left_out.append(f"transformers batched_mm: would copy {copied / 2**30:.0f} GiB of weights, more than 8")
        else:
            modules[f"transformers {name}"] = RoutedPart(ours, shape, name)
    return modules, left_out


def measure(rank: int, shape: Shape, tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that this process can time, on this rank and the others together."""
    world, size = dist.group.WORLD, dist.get_world_size()
    assert world is not None, "on_ranks has made it"
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, shape.hidden, generator=generator).to(dtype) for _ in range(2))
    mine = slice(rank * tokens // size, (rank + 1) * tokens // size)
    calls: dict[str, Together] = {}
    memory: dict[str, dict[str, int]] = {}
    left_out: list[str] = []
    if rank == 0:
        modules, left_out = alone_candidates(shape, tokens, dtype)
        expected = forward_and_backward(modules["ours ep1"], x, grad)()
        for name, module in modules.items():
            calls[name] = Together(forward_and_backward(module, x, grad), alone=True, threads=2)
            if name != "dense":
                check_outputs(name, calls[name].call(), expected)
                memory[name] = activation_bytes(module, x, grad)
    names = [list(calls)]
    dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        calls.setdefault(name, Together(lambda: None, alone=True, threads=2))
    if size > 1:
        for name, make in TRANSPORTS.items():
            layer = our_layer(shape, make(world), dtype)
            calls[f"ours ep{size} {name}"] = Together(forward_and_backward(layer, x[mine], grad[mine]))
            if rank == 0:
                check_outputs(f"ours ep{size} {name}", calls[f"ours ep{size} {name}"].call(), expected[mine])
            else:
                calls[f"ours ep{size} {name}"].call()
    return {"times": all_times(calls, rounds=rounds), "activation_bytes": memory, "left_out": left_out}


def peer_time(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """What the peer's own process says."""
    line = [args.peers_python, "-m", "benchmarks.peer_layers", "--peer", name, "--ep", str(PEER_RANKS)]
    sizes = {"tokens": args.tokens, "hidden": shape.hidden, "width": shape.width, "experts": shape.experts}
    for key, value in {**sizes, "top-k": shape.top_k, "rounds": args.rounds, "dtype": args.dtype}.items():
        line += [f"--{key}", str(value)]
    if args.megatron_shim:
        line += ["--megatron-shim", str(args.megatron_shim)]
    if shutil.which(args.peers_python) is None:
        return {"peer": name, "left_out": f"there is no {args.peers_python}"}
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"peer": name, "left_out": f"did not finish in {_PATIENCE} s"}
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
        "activation_memory_vs_transformers": memory["ours ep1"]["peak"] / memory[best]["peak"],
        "held_activation_vs_transformers": memory["ours ep1"]["held"] / memory[best]["held"],
    }
    if "ours ep2 shared_memory" in ms:
        ratios["ep2_shared_memory_vs_ep1"] = ms["ours ep1"] / ms["ours ep2 shared_memory"]
    ours, peers = (
        [t for name, t in ms.items() if " ep2" in name and name.startswith("ours") == is_ours]
        for is_ours in (True, False)
    )
    if ours and peers:
        ratios["ep2_vs_peers"] = min(peers) / min(ours)
    return ratios


def compare(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and ratios of one shape, and who was left out."""
    times: dict[str, list[float]] = {}
    found: dict[str, Any] = {"times": {}, "activation_bytes": {}, "left_out": [], "peers": {}}
    peers = list(args.peers)
    for _ in range(args.turns):
        for ranks in args.ep or [1]:
            part = on_ranks(measure, shape, args.tokens, args.rounds, getattr(torch, args.dtype), world_size=ranks)
            for name, ms in part["times"].items():
                if f"ep{ranks}" in name or ranks == (args.ep or [1])[0]:
                    times.setdefault(name, []).extend(ms)
            found["activation_bytes"] |= part["activation_bytes"]
            left_out = part["left_out"]
        for peer in list(peers):
            answer = peer_time(peer, shape, args)
            if "left_out" in answer:
                peers.remove(peer)
                found["left_out"].append(f"{peer}: {answer['left_out']}")
            else:
                times.setdefault(f"{peer} ep{PEER_RANKS}", []).extend(answer["times_ms"])
                found["peers"][peer] = {key: answer[key] for key in ("version", "notes")}
    found["left_out"] += left_out
    found["times"] = {name: summary(ms) for name, ms in times.items()}
    found["ratios"] = ratios_of(found["times"], found["activation_bytes"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--ep", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=8, help="of one turn")
    parser.add_argument("--turns", type=int, default=3, help="of ours and theirs")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of experts and tokens")
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the other engines")
    parser.add_argument("--megatron-shim", type=Path, help="a file that lets megatron-core run on CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, Any] = {}
    for name in args.shapes:
        results[name] = found = compare(SHAPES[name], args)
        print_table(f"one MoE layer, {name} {SHAPES[name]}", found["times"], found["ratios"])
        print(*found["left_out"], sep="\n", file=sys.stderr)  # noqa: T201
    setting = {key: v for key, v in vars(args).items() if key not in ("json", "peers_python", "megatron_shim")}
    setting["threads"] = "EP=1: 2; EP=2: 1 per rank; EP=4: 1 per rank, two ranks per core"
    setting["activation_bytes"] = "bytes of torch's allocator beyond those before, without weight gradients that stay"
    write_results(args.json, f"one MoE layer, forward and backward, {args.dtype}", setting, results)


if __name__ == "__main__":
    main()
