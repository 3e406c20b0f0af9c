"""How fast is the MoE layer on one rank, against transformers' Mixtral block in its two implementations?

    python -m benchmarks.bench_moe_layer [--tokens 2048] [--json OUT]

The same weights, the same tokens, the router's own routing (not forced to balance); forward and backward.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.timing import time_in_turn, write_results
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer

PEERS = ("eager", "grouped_mm")  # batched_mm copies an expert per token: 44 GiB at the default sizes


def ours(hidden: int, width: int, experts: int, top_k: int) -> MoELayer:
    """Our layer with a linear gate, as Mixtral has."""
    moe = MoEConfig(num_experts=experts, top_k=top_k, expert_hidden_size=width, gate="linear")
    layer = MoELayer(moe, hidden, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * hidden**-0.5)
    return layer


def peer(layer: MoELayer, implementation: str) -> nn.Module:
    """transformers' block with the weights of `layer`."""
    e, d, f = layer.experts.w_down.shape
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=e, num_experts_per_tok=layer.moe.top_k)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.w_in)
        block.experts.gate_up_proj.copy_(layer.experts.w_gate_up)
        block.experts.down_proj.copy_(layer.experts.w_down)
    return block


def forward_and_backward(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        y.backward(grad.view_as(y))
        return y.detach()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 1024), ("width", 704), ("experts", 16), ("top-k", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    layer = ours(args.hidden, args.width, args.experts, args.top_k)
    x, grad = torch.randn(args.tokens, args.hidden), torch.randn(args.tokens, args.hidden)
    calls = {"ep_engine": forward_and_backward(layer, x, grad)}
    for implementation in PEERS:
        calls[f"transformers {implementation}"] = forward_and_backward(
            peer(layer, implementation), x.unsqueeze(0), grad
        )
    expected = calls["ep_engine"]()
    for name, call in calls.items():
        torch.testing.assert_close(call().view_as(expected), expected, rtol=1e-3, atol=1e-3, msg=name)
    results = time_in_turn(calls, rounds=args.rounds, warm_up=1)
    setting = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(args.json, "MoE layer, one rank, forward and backward, float32", setting, results)


if __name__ == "__main__":
    main()
