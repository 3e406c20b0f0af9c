"""Computing again keeps less, and a decoder without ranks has the same bits with it."""

from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks.moe_layer import activation_bytes
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.recompute import Recompute

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    moe=MoEConfig(num_experts=8, top_k=2, expert_hidden_size=48, gate="mlp"),
)  # fmt: skip


class OneLayer(nn.Module):
    """A decoder layer of a tensor and nothing else."""

    def __init__(self, what: Recompute) -> None:
        super().__init__()
        torch.manual_seed(0)
        decoder = Decoder(CONFIG)
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=0.2)
        decoder.recompute(what)
        self.layer = decoder.decoder_layers()[0]

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD, _ = self.layer(x_BSD)
        assert isinstance(y_BSD, Tensor)
        return y_BSD


def test_each_step_keeps_less_and_changes_no_bit() -> None:
    x, grad = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    held, results = {}, []
    for what in get_args(Recompute):
        module, leaf = OneLayer(what), x.clone().requires_grad_()
        held[what] = activation_bytes(module, x, grad)["held"]
        y = module(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    assert held["selective"] < 0.8 * held["none"]
    assert held["full"] < 0.4 * held["none"]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
