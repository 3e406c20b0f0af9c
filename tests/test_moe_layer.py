"""The layer on one rank: by hand, against the reference forward and backward, and at the edges."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ep_engine import reference
from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site
from ep_engine.transport import Alone, Link
from tests.moe_cases import D, make_layer, set_routing

# Sums in float32, in another order than the reference's.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_five_tokens_by_hand() -> None:
    """Experts that multiply by 1, 2, 3 where the input is positive and large: silu(x) is x there."""
    layer = MoELayer(MoEConfig(num_experts=3, top_k=2, expert_hidden_size=1, gate="linear", score_scale=2.0), 1, 0)
    with torch.no_grad():
        layer.router.w_in.zero_()
        layer.experts.w_gate_up[:, 0] = 1.0
        layer.experts.w_gate_up[:, 1] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1)
        layer.experts.w_down.fill_(1.0)
    set_routing(layer, torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]))
    x_TD = torch.tensor([[50.0], [60.0], [70.0], [80.0], [90.0]])
    y_TD, router = layer(x_TD)
    # Equal logits: weights are 1 and 1. Expert e gives (e + 1) x^2.
    assert (y_TD / x_TD**2).tolist() == [[3.0], [5.0], [4.0], [4.0], [3.0]]
    assert router.load_E.tolist() == [4.0, 3.0, 3.0]


def forward_and_grads(layer: MoELayer, x_TD: Tensor, grad: Tensor) -> list[Tensor]:
    x = x_TD.clone().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def reference_and_grads(layer: MoELayer, x_TD: Tensor, grad: Tensor) -> list[Tensor]:
    """The same by the plain loop, in logical order of experts."""
    x = x_TD.clone().requires_grad_()
    layer.zero_grad()
    routing = layer.router(x)
    rows = [layer.site.experts_here().index(expert) for expert in range(layer.moe.num_experts)]
    experts = (*layer.experts.w_gate_up[rows].chunk(2, dim=1), layer.experts.w_down[rows])
    y = reference.moe_forward(x, routing.ids_TK, routing.weights_TK, *experts)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("one_row_per_copy", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize(("num_experts", "top_k", "devices"), [(8, 2, 4), (8, 8, 2), (7, 3, 2), (4, 2, 1)])
def test_layer_matches_the_reference(
    num_experts: int, top_k: int, devices: int, num_tokens: int, one_row_per_copy: bool
) -> None:
    layer = make_layer(num_experts, top_k, devices, one_row_per_copy=one_row_per_copy)
    x_TD, grad = torch.randn(num_tokens, D), torch.randn(num_tokens, D)
    found, expected = forward_and_grads(layer, x_TD, grad), reference_and_grads(layer, x_TD, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("one_row_per_copy", [False, True])
def test_all_tokens_to_one_expert_and_experts_without_tokens(one_row_per_copy: bool) -> None:
    layer = make_layer(8, 2, 4, one_row_per_copy=one_row_per_copy)
    ids_TK = torch.tensor([[5, 2]]).expand(30, 2).contiguous()
    set_routing(layer, ids_TK)
    x_TD, grad = torch.randn(30, D), torch.randn(30, D)
    found, expected = forward_and_grads(layer, x_TD, grad), reference_and_grads(layer, x_TD, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    idle = [row for row, expert in enumerate(layer.site.experts_here()) if expert not in (2, 5)]
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert weight.grad[idle].abs().sum() == 0


def test_one_row_per_copy_does_not_depend_on_the_placement() -> None:
    """It is the oracle of placements: sums at home, in the order of expert ids."""
    x_TD, grad = torch.randn(40, D).bfloat16(), torch.randn(40, D).bfloat16()
    results = []
    for devices in (1, 2, 4):
        layer = make_layer(8, 3, devices, one_row_per_copy=True, dtype=torch.bfloat16)
        results.append(forward_and_grads(layer, x_TD, grad)[:2])
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_twice_the_same_bits() -> None:
    layer, x_TD, grad = make_layer(8, 2, 4), torch.randn(64, D), torch.randn(64, D)
    for a, b in zip(forward_and_grads(layer, x_TD, grad), forward_and_grads(layer, x_TD, grad), strict=True):
        assert torch.equal(a, b)


def test_threads_over_experts_give_the_bits_of_one_thread() -> None:
    layer, x_TD, grad = make_layer(8, 2, 4), torch.randn(300, D), torch.randn(300, D)
    set_routing(layer, torch.stack([torch.randperm(7)[:2] for _ in range(300)]))  # the last one idle
    threads = torch.get_num_threads()
    results: list[Any] = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(forward_and_grads(layer, x_TD, grad))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_layer_joins_a_group_with_the_experts_of_its_place() -> None:
    layer = MoELayer(MoEConfig(num_experts=7, top_k=2, expert_hidden_size=4), D, 0)
    placement = Placement(devices=2, factors=(2,), layers=[[6, 0, 3, 1, 2, 4, 5, -1]])
    layer.join(Site.of(placement, 0, placement.cut(2), 1), Link(Alone(), Ledger(), 0))
    assert layer.site.experts_here() == [2, 4, 5, -1]
    assert layer.experts.w_down.shape == (4, D, 4)
