"""The load-balance loss by hand, against autograd of the formula, and over ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.load_balance import RouterStatistics, load_balance_loss, router_statistics
from ep_engine.router import Routing
from tests.distributed import run_ranks

L, E, K = 3, 6, 2


def routing_of(logits_TE: Tensor, ids_TK: Tensor | None = None) -> Routing:
    ids_TK = logits_TE.detach().topk(K, dim=1).indices if ids_TK is None else ids_TK
    return Routing(ids_TK, torch.full(ids_TK.shape, 1 / ids_TK.shape[1]), logits_TE)


def random_layers(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_tokens, E, generator=generator).requires_grad_() for _ in range(L)]


def formula(layers: list[Routing]) -> Tensor:
    """arXiv:2101.03961 eq. 4-6, token by token in float64, the shares taken of the copies."""
    losses = []
    for ids_TK, _, logits_TE in layers:
        share = [float((ids_TK == e).sum()) / ids_TK.numel() for e in range(E)]
        probability_E = logits_TE.double().softmax(dim=1).mean(dim=0)
        losses.append(E * sum(f * p for f, p in zip(share, probability_E, strict=True)))
    return torch.stack(losses).mean()


def test_statistics_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], requires_grad=True)
    statistics = router_statistics(routing_of(logits, torch.tensor([[0], [1]])))
    assert statistics.load_E.tolist() == [1.0, 1.0]
    torch.testing.assert_close(statistics.probability_E, torch.tensor([0.5 + 0.25, 0.5 + 0.75]))
    assert statistics.ids_TK.tolist() == [[0], [1]]
    assert torch.equal(statistics.logits_TE, logits)
    requires_grad = [tensor.requires_grad for tensor in statistics]
    assert requires_grad == [False, True, False, False]


def test_loss_by_hand() -> None:
    # three of four copies go to expert 0; its mean probability is 0.8: 2 * (0.75 * 0.8 + 0.25 * 0.2)
    layer = RouterStatistics(
        torch.tensor([3.0, 1.0]), torch.tensor([3.2, 0.8]), torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 2)
    )
    assert float(load_balance_loss([layer], 4, None)) == pytest.approx(1.3)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_equally_busy_experts_cost_1(top_k: int) -> None:
    ids_TK = torch.stack([torch.arange(E).roll(-k) for k in range(top_k)], dim=1)
    layers = [router_statistics(routing_of(torch.zeros(E, E), ids_TK))] * L
    assert float(load_balance_loss(layers, E, None)) == pytest.approx(1.0)


def test_one_expert_for_everything_costs_the_number_of_experts() -> None:
    logits = torch.full((4, E), -50.0)
    logits[:, 2] = 50.0
    layer = router_statistics(routing_of(logits, torch.full((4, 1), 2)))
    assert float(load_balance_loss([layer], 4, None)) == pytest.approx(E)


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    ours, plain = random_layers(20), random_layers(20)
    loss = load_balance_loss([router_statistics(routing_of(logits)) for logits in ours], 20, None)
    expected = formula([routing_of(logits) for logits in plain])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected.float())
    for logits, plain_logits in zip(ours, plain, strict=True):
        assert logits.grad is not None
        assert logits.grad.abs().max() > 1e-4
        torch.testing.assert_close(logits.grad, plain_logits.grad)


def test_a_step_down_the_gradient_takes_from_the_busy_experts() -> None:
    logits = torch.zeros(8, E, requires_grad=True)
    load_balance_loss([router_statistics(routing_of(logits, torch.tensor([[0, 1]] * 8)))], 8, None).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :2] > 0).all()
    assert (logits.grad[:, 2:] < 0).all()


def test_the_choices_count_and_not_the_scores() -> None:
    """Under a constrained rule an expert may have high scores and no token."""
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 0.0]] * 4)
    chosen = router_statistics(routing_of(logits, torch.tensor([[0, 5]] * 4)))
    assert chosen.load_E.tolist() == [4, 0, 0, 0, 0, 4]
    assert chosen.probability_E[1] > chosen.probability_E[5]


@pytest.mark.parametrize("tokens_of_rank", [[11, 4], [15, 0]], ids=str)
def test_shares_of_ranks_add_up_to_the_loss_of_one(tokens_of_rank: list[int]) -> None:
    run_ranks(_check_shares, tokens_of_rank)


def _check_shares(rank: int, world_size: int, tokens_of_rank: list[int]) -> None:
    assert len(tokens_of_rank) == world_size
    whole, mine = random_layers(15), random_layers(15)
    expected = load_balance_loss([router_statistics(routing_of(logits)) for logits in whole], 15, None)
    expected.backward()
    first = sum(tokens_of_rank[:rank])
    part = slice(first, first + tokens_of_rank[rank])
    share = load_balance_loss([router_statistics(routing_of(logits[part])) for logits in mine], 15, dist.group.WORLD)
    share.backward()
    total = share.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    for logits, all_logits in zip(mine, whole, strict=True):
        torch.testing.assert_close(logits.grad[part], all_logits.grad[part])
