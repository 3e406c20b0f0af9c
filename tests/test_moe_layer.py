"""The layer on one rank: by hand, against the reference forward and backward, and at the edges."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ep_engine import debug, experts, reference, weight_grads
from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.model_config import MoEConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.placement import Placement
from ep_engine.plan import Site, make_plan
from ep_engine.router import Choice
from ep_engine.transports.transport import Alone, Link
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


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("one_row_per_copy", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize(("num_experts", "top_k", "devices"), [(8, 2, 4), (8, 8, 2), (7, 3, 2), (4, 2, 1)])
def test_layer_matches_the_reference(
    num_experts: int, top_k: int, devices: int, num_tokens: int, one_row_per_copy: bool, grouped: bool
) -> None:
    layer = make_layer(num_experts, top_k, devices, one_row_per_copy=one_row_per_copy)
    layer.experts.grouped = grouped
    x_TD, grad = torch.randn(num_tokens, D), torch.randn(num_tokens, D)
    found, expected = forward_and_grads(layer, x_TD, grad), reference_and_grads(layer, x_TD, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("one_row_per_copy", [False, True])
def test_all_tokens_to_one_expert_and_experts_without_tokens(one_row_per_copy: bool, grouped: bool) -> None:
    layer = make_layer(8, 2, 4, one_row_per_copy=one_row_per_copy)
    layer.experts.grouped = grouped
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


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_of_weights_may_come_later_with_the_same_bits(grouped: bool) -> None:
    layer, x_TD, grad = make_layer(8, 2, 4), torch.randn(64, D), torch.randn(64, D)
    layer.experts.grouped = grouped
    expected = forward_and_grads(layer, x_TD, grad)
    layer.experts.weight_grads_later = True
    for a, b in zip(expected, forward_and_grads(layer, x_TD, grad), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_rows_are_not_computed_again_for_those_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As zero-bubble schedules do it: first the rows', and from the node that ties both together the weights'."""
    layer, x_TD = make_layer(8, 2, 4), torch.randn(64, D)
    expected = forward_and_grads(layer, x_TD, torch.ones(64, D))
    layer.experts.weight_grads_later = True
    layer.zero_grad()
    calls = Counter[str]()
    for function in (experts._Mixture, weight_grads._WeightGrads):
        plain = function.backward

        def counted(ctx: Any, *grads: Tensor, plain: Any = plain, name: str = function.__name__) -> Any:
            calls[name] += 1
            return plain(ctx, *grads)

        monkeypatch.setattr(function, "backward", staticmethod(counted))
    x = x_TD.clone().requires_grad_()
    y, _ = layer(x)
    weights = list(layer.experts.parameters())
    (grad_x,) = torch.autograd.grad(y, x, torch.ones(64, D), retain_graph=True)
    assert torch.equal(grad_x, expected[1])
    assert calls == {"_Mixture": 1}
    node = y.grad_fn
    while node is not None and "_Join" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None
    edge = GradientEdge(node, 0)
    grads = torch.autograd.grad((edge,), weights, (torch.zeros(64, D),))
    assert calls == {"_Mixture": 1, "_WeightGrads": 1}
    for grad, whole in zip(grads, expected[-2:], strict=True):
        assert torch.equal(grad, whole)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([[0, 8]], r"layer 0 on rank 0: token 0 names an expert outside 0..7: \[0, 8\]"),
        ([[0, 1], [3, 3]], r"token 1 names an expert twice: \[3, 3\]"),
    ],
)
def test_debug_finds_ids_that_cannot_be(ids: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_DEBUG", "1")
    layer = make_layer(8, 2, 4)
    make_plan(torch.tensor([[0, 1]]), layer.way[0])
    with pytest.raises(Fault, match=sentence):
        make_plan(torch.tensor(ids), layer.way[0])


def test_debug_finds_slots_that_cannot_be() -> None:
    good = torch.tensor([[0, 2, -1], [1, -1, -1]]).int()
    debug.check_slots(good, 3, "here")
    for row in ([2, 0, -1], [0, 3, -1], [-1, -1, -1], [0, -1, 2], [0, -2, -1], [1, 1, -1]):
        with pytest.raises(Fault, match=r"here: arrived row 1 names slots .* of 3"):
            debug.check_slots(torch.tensor([[0, 2, -1], row]).int(), 3, "here")


def test_the_layer_joins_a_group_with_the_experts_of_its_place() -> None:
    layer = MoELayer(MoEConfig(num_experts=7, top_k=2, expert_hidden_size=4), D, 0)
    placement = Placement(devices=2, factors=(2,), layers=[[6, 0, 3, 1, 2, 4, 5, -1]])
    layer.join(Site.of(placement, 0, 2, 1), Link(Alone(), Ledger(), 0))
    assert layer.site.experts_here() == [2, 4, 5, -1]
    assert layer.experts.w_down.shape == (4, D, 4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("one_row_per_copy", [False, True])
def test_choices_that_are_dropped_bring_nothing(one_row_per_copy: bool, grouped: bool) -> None:
    """Some tokens lose a choice, some all: the others are as they were, and those get the rest, or 0."""
    layer = make_layer(8, 2, 4, one_row_per_copy=one_row_per_copy)
    layer.experts.grouped = grouped
    x, grad = torch.randn(40, D).requires_grad_(), torch.randn(40, D)
    routing = layer.router(x)
    kept_TK = torch.rand(40, 2) > 0.4
    assert {0, 1, 2} == set(kept_TK.sum(dim=1).tolist())
    y, router = layer(x, None, [Choice(routing.ids_TK, kept_TK)])
    y.backward(grad)
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    routing = layer.router(x)
    rows = [layer.site.experts_here().index(expert) for expert in range(8)]
    experts = (*layer.experts.w_gate_up[rows].chunk(2, dim=1), layer.experts.w_down[rows])
    expected = reference.moe_forward(x, routing.ids_TK, routing.weights_TK * kept_TK, *experts)
    expected.backward(grad)
    for a, b in zip(found, [expected.detach(), x.grad, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    of_experts = [int((routing.ids_TK[~kept_TK] == expert).sum()) for expert in range(8)]
    assert router.dropped_E.tolist() == of_experts
