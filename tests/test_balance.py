"""Balance: golden numbers, plain formulas, gradients; sums over ranks and parts; noise, capacity, what is kept."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ep_engine.balance_losses import Seen, losses_of, probabilities, squared_variation
from ep_engine.capacity import Capacity
from ep_engine.config import BalanceSection, make_config
from ep_engine.load_balance import router_statistics
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.noise import gumbel, normal
from ep_engine.planning.activations import Part
from ep_engine.planning.expert_traffic import Passed
from ep_engine.router import Noise, Router, Routing
from ep_engine.training.watch import RouterWatch
from tests.distributed import run_ranks
from tests.small_models import random_lists

E, K, L = 6, 2, 3
KINDS = ("switch", "importance", "load", "sequence", "mutual_information", "z")


def section(**coefficients: Any) -> BalanceSection:
    return BalanceSection(**{"switch": 0.0, **coefficients})


def kind_of(name: str, **options: Any) -> Any:
    (_, kind) = losses_of(section(**{name: 1.0, **options}))[name]
    return kind


def routing_of(logits_TE: Tensor, ids_TK: Tensor | None = None, noise: Noise | None = None) -> Routing:
    ids_TK = logits_TE.detach().topk(K, dim=1).indices if ids_TK is None else ids_TK
    return Routing(ids_TK, logits_TE.gather(1, ids_TK).softmax(dim=1), logits_TE, noise)


def seen_of(
    routing: Routing, counts_T: Tensor | None = None, num_rows: int = 1, score: str = "softmax_of_chosen"
) -> Seen:
    return Seen(routing, probabilities(routing.logits_TE, score), counts_T, num_rows)


def loss_of(name: str, seen: Seen, over: int, **options: Any) -> Tensor:
    kind = kind_of(name, **options)
    value: Tensor = kind.value(kind.sums(seen), torch.tensor(float(over)))
    return value


GOLDEN = torch.tensor([[1.0, 2, 0, -1], [0.5, -0.5, 0.25, 0], [3, 0, 1, 2]])
DRAWN = torch.tensor([[0.1, -0.2, 0.3, 0], [-0.1, 0.2, 0, 0.4], [0, 0.5, -0.3, 0.2]])


def test_golden_numbers_of_llama_moe() -> None:
    """specs/llama_moe.md 3.2, computed there with the published code; its loss is 0.01 times the two."""
    seen = seen_of(routing_of(GOLDEN))
    assert kind_of("importance").sums(seen).tolist() == pytest.approx([1.5621765, 0.73105858, 0.4378235, 0.26894142])
    assert kind_of("load").sums(seen).tolist() == [3, 1, 1, 1]
    both = loss_of("importance", seen, 3) + loss_of("load", seen, 3)
    assert float(0.01 * both) == pytest.approx(0.0103043614, rel=1e-6)

    deviation = torch.full_like(GOLDEN, math.log(2) + 0.01)
    noisy = seen_of(routing_of(GOLDEN + DRAWN, noise=Noise(GOLDEN, deviation)))
    assert kind_of("importance").sums(noisy).tolist() == pytest.approx([1.521787, 0.668188, 0, 0.810026], abs=1e-6)
    for compat, load_E, loss in (
        (False, [2.478633, 1.093348, 0.518346, 1.33026], 0.01061179),
        (True, [1.872386, 1.000878, 0.518346, 0.75054], 0.01018876),
    ):
        options: dict[str, Any] = {"noise": True, "reference_compat": compat}
        assert kind_of("load", **options).sums(noisy).tolist() == pytest.approx(load_E, rel=1e-5)
        both = loss_of("importance", noisy, 3) + loss_of("load", noisy, 3, **options)
        assert float(0.01 * both) == pytest.approx(loss, rel=1e-5)


def test_balance_and_its_opposite() -> None:
    even = seen_of(routing_of(torch.zeros(E, E), torch.stack([torch.arange(E), torch.arange(E).roll(1)], dim=1)))
    assert float(loss_of("switch", even, E)) == pytest.approx(1.0)
    assert float(loss_of("sequence", even, 1)) == pytest.approx(1.0)
    assert float(loss_of("importance", even, E)) == pytest.approx(0.0, abs=1e-12)
    assert float(loss_of("mutual_information", even, E)) == pytest.approx(0.0, abs=1e-6)  # nothing is learnt of a token
    assert float(loss_of("z", even, E)) == pytest.approx(math.log(E) ** 2)

    logits = torch.full((4, E), -50.0)
    logits[:, 2] = 50.0
    one = seen_of(routing_of(logits, torch.full((4, 1), 2)))
    assert float(loss_of("switch", one, 4)) == pytest.approx(E)
    assert float(loss_of("load", one, 4)) == pytest.approx(E)  # E of one unit: variance E / E^2... over mean^2
    assert float(loss_of("mutual_information", one, 4)) == pytest.approx(0.0, abs=1e-6)
    sure = seen_of(routing_of(100 * torch.eye(E), torch.arange(E)[:, None]))
    assert float(loss_of("mutual_information", sure, E)) == pytest.approx(-math.log(E), rel=1e-6)


def test_variation_is_that_of_a_sample() -> None:
    v = torch.tensor([1.0, 2.0, 6.0])
    assert float(squared_variation(v)) == pytest.approx(7.0 / 9.0)
    assert float(squared_variation(v[:1])) == 0.0


def plain(name: str, logits_TE: Tensor, rows: int, score: str) -> Tensor:
    """Every loss token by token, in float64; of sigmoids p is the share (arXiv:2412.19437 eq. 19)."""
    logits_TE = logits_TE.double()
    p_TE, ids_TK = logits_TE.softmax(dim=1), logits_TE.detach().topk(K, dim=1).indices
    if score == "sigmoid":
        s_TE = 1 / (1 + torch.exp(-logits_TE))
        p_TE = s_TE / s_TE.sum(dim=1, keepdim=True)
    tokens = len(p_TE)

    def switch(part: slice) -> Tensor:
        share = [float((ids_TK[part] == e).sum()) / ids_TK[part].numel() for e in range(E)]
        return E * sum(f * p for f, p in zip(share, p_TE[part].mean(dim=0), strict=True))

    if name == "switch":
        return switch(slice(None))
    if name == "sequence":
        each = tokens // rows
        return sum(switch(slice(row * each, (row + 1) * each)) for row in range(rows)) / rows
    if name == "importance":
        chosen = torch.zeros(E, dtype=torch.float64)
        for t in range(tokens):
            w = logits_TE[t, ids_TK[t]].softmax(dim=0)
            chosen = chosen.index_add(0, ids_TK[t], w)
        return ((chosen - chosen.mean()) ** 2).sum() / (E - 1) / chosen.mean() ** 2
    if name == "z":
        return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits_TE) / tokens
    mean = p_TE.mean(dim=0)
    return -(p_TE * p_TE.log()).sum() / tokens + (mean * (mean + 1e-8).log()).sum()


@pytest.mark.parametrize(
    ("name", "score"),
    [
        *((name, "softmax") for name in KINDS if name != "load"),
        *((name, "sigmoid") for name in ("switch", "sequence", "importance", "z")),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(name: str, score: str) -> None:
    ours = torch.randn(20, E, generator=torch.Generator().manual_seed(1)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    found = loss_of(name, seen_of(routing_of(ours), num_rows=4, score=score), 4 if name == "sequence" else 20)
    expected = plain(name, theirs, rows=4, score=score)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected.float())
    assert ours.grad is not None
    assert ours.grad.abs().max() > 1e-4
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_smooth_load_has_the_gradient_of_differences() -> None:
    clean = torch.randn(5, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = torch.randn(5, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kind = kind_of("load", noise=True)

    def loss(clean_TE: Tensor, deviation_TE: Tensor) -> Tensor:
        noisy = clean_TE + deviation_TE * drawn
        value: Tensor = kind.value(
            kind.sums(seen_of(routing_of(noisy, noise=Noise(clean_TE, deviation_TE)))), torch.ones(())
        )
        return value

    inputs = (clean.requires_grad_(), torch.full_like(clean, 0.7).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("top_t", [K - 1, K + 1])
def test_a_smooth_load_under_c2r_is_of_the_experts_that_are_open(top_t: int) -> None:
    """Chances by drawing an expert's noise again, the best expert and so the open ones being given."""
    lists = random_lists(E, random.Random(1))
    moe = MoEConfig(
        num_experts=E,
        top_k=K,
        expert_hidden_size=8,
        gate="linear",
        gate_noise=True,
        routing=RoutingConfig(rule="c2r", top_t=top_t, lists=[lists]),
    )
    router = Router(moe, 16, 0)
    for weight in router.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    router.add_noise(seed=2)
    routing = router(torch.randn(3, 16, generator=torch.Generator().manual_seed(5)), torch.arange(3))
    kind = kind_of("load", noise=True)
    found_E = kind.sums(seen_of(routing))
    assert routing.noise is not None
    expected_E, again = torch.zeros(E), torch.randn(40_000, generator=torch.Generator().manual_seed(6))
    for logits, clean, deviation, ids in zip(
        routing.logits_TE.detach(), *(x.detach() for x in routing.noise[:2]), routing.ids_TK.tolist(), strict=True
    ):
        inside = [ids[0], *lists[ids[0]][:top_t]]
        for expert in inside:
            others = sorted((float(logits[e]) for e in inside if e != expert), reverse=True)
            bar = others[K - 1] if len(others) >= K else -math.inf
            expected_E[expert] += float((clean[expert] + deviation[expert] * again > bar).float().mean())
    torch.testing.assert_close(found_E.detach(), expected_E, atol=0.02, rtol=0)
    kind.value(found_E, torch.ones(())).backward()
    assert router.w_in.grad is not None
    assert router.w_in.grad.isfinite().all()
    published = kind_of("load", noise=True, reference_compat=True).sums(seen_of(routing))
    assert (published > found_E + 1e-3).any()  # of experts, too, that cannot be chosen


@pytest.mark.parametrize("name", KINDS)
def test_padding_counts_for_nothing(name: str) -> None:
    logits = torch.randn(12, E, generator=torch.Generator().manual_seed(4))
    counts = torch.tensor([True] * 4 + [False] * 2 + [True] * 3 + [False] * 3)  # two rows of six
    whole = seen_of(routing_of(logits), counts, num_rows=2)
    if name == "sequence":
        rows = [seen_of(routing_of(logits[part])) for part in (slice(0, 4), slice(6, 9))]
        expected = (loss_of(name, rows[0], 1) + loss_of(name, rows[1], 1)) / 2
        torch.testing.assert_close(loss_of(name, whole, 2), expected)
    else:
        left = seen_of(routing_of(logits[counts]))
        torch.testing.assert_close(loss_of(name, whole, 7), loss_of(name, left, 7))
    found = router_statistics(routing_of(logits), counts_T=counts, num_rows=2)
    assert (int(found.num_tokens), float(found.load_E.sum())) == (7, 14.0)
    assert found.ids_TK[~counts].eq(-1).all()


def test_the_choices_count_and_not_the_scores() -> None:
    """Under a constrained rule an expert may have high scores and no token; C2R's published code counts plain top-k."""
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 0.0]] * 4)
    seen = seen_of(routing_of(logits, torch.tensor([[0, 5]] * 4)))
    assert kind_of("switch").sums(seen)[:E].tolist() == [4, 0, 0, 0, 0, 4]
    assert kind_of("switch", switch_of="plain").sums(seen)[:E].tolist() == [4, 4, 0, 0, 0, 0]


def layers_of(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, E, generator=generator).requires_grad_() for _ in range(L)]


MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=L,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    moe=MoEConfig(num_experts=E, top_k=K, expert_hidden_size=8),
)


def watch_of(asked: BalanceSection, parts: int, rows: int, alone: dist.ProcessGroup) -> RouterWatch:
    assert dist.group.WORLD is not None
    options: dict[str, Any] = {"losses": losses_of(asked), "of_rank": asked.over == "rank"}
    return RouterWatch(MODEL, torch.device("cpu"), dist.group.WORLD, alone, num_parts=parts, num_rows=rows, **options)


def run_parts(watch: RouterWatch, asked: BalanceSection, parts: Sequence[list[Tensor]], rows: int) -> None:
    """Forward and backward of the parts of a batch."""
    kinds = tuple(kind for _, kind in losses_of(asked).values())
    for layers in parts:
        statistics = {
            i: router_statistics(routing_of(one), losses=kinds, num_rows=rows) for i, one in enumerate(layers)
        }
        watch(torch.zeros(1, requires_grad=True), statistics).sum().backward()


def test_ranks_share_the_losses_of_a_batch() -> None:
    run_ranks(_check_ranks, world_size=2)


def _check_ranks(rank: int, world_size: int) -> None:
    groups = [dist.new_group([r]) for r in range(world_size)]
    asked = section(switch=1.0, importance=0.3, load=0.2, sequence=0.5, mutual_information=0.4, z=0.1)
    whole, mine = layers_of(16), layers_of(16)
    expected = torch.zeros(())
    for name, (coefficient, _) in losses_of(asked).items():
        values = [loss_of(name, seen_of(routing_of(one), num_rows=4), 4 if name == "sequence" else 16) for one in whole]
        expected = expected + coefficient * torch.stack(values).mean()
    expected.backward()
    watch = watch_of(asked, 1, 4, groups[rank])
    part = slice(8 * rank, 8 * rank + 8)
    run_parts(watch, asked, [[one[part] for one in mine]], rows=2)
    for one, all_ in zip(mine, whole, strict=True):
        torch.testing.assert_close(one.grad[part], all_.grad[part])
    shares = watch.taken(dist.group.WORLD)[5:]
    total = sum(c * float(share) for (c, _), share in zip(losses_of(asked).values(), shares, strict=True))
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_parts_add_up_to_the_batch_as_far_as_it_is_known() -> None:
    run_ranks(_check_parts, world_size=1)


def _check_parts(rank: int, world_size: int) -> None:
    alone = dist.new_group([0])
    for over in ("batch", "rank"):
        asked = section(switch=1.0, importance=0.3, mutual_information=0.4, over=over)
        whole, mine = layers_of(16), layers_of(16)
        watch = watch_of(asked, 2, 4, alone)
        for _ in range(2):  # a second step forgets the first
            for one in mine:
                one.grad = None
            watch.begin_step()
            run_parts(watch, asked, [[one[:8] for one in mine], [one[8:] for one in mine]], rows=2)
        # The gradient of a part's own tokens in the loss of: the part twice; for the second, of both.
        for part, known in (
            (slice(0, 8), slice(0, 8)),
            (slice(8, 16), slice(0, 16) if over == "batch" else slice(8, 16)),
        ):
            expected = torch.zeros(())
            times = 16 // (known.stop - known.start)
            for one in whole:
                one.grad = None
                rows = torch.cat([one[known].detach()] * (times - 1) + [one[known]]) if times > 1 else one[known]
                seen = seen_of(routing_of(rows))
                for name, (coefficient, _) in losses_of(asked).items():
                    expected = expected + coefficient * loss_of(name, seen, 16) / L
            expected.backward()
            for one, all_ in zip(mine, whole, strict=True):
                torch.testing.assert_close(one.grad[part], all_.grad[part], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("draw", "distribution"), [(normal, "norm"), (gumbel, "gumbel_r")])
def test_noise_has_its_distribution_and_belongs_to_the_token(draw: Any, distribution: str) -> None:
    drawn = draw(torch.arange(20_000), 8, seed=3, stream=1)
    assert stats.kstest(drawn.flatten().numpy()[:50_000], distribution).pvalue > 0.01
    corr = torch.corrcoef(drawn.t())
    assert float((corr - torch.eye(8)).abs().max()) < 0.05
    assert torch.equal(draw(torch.tensor([5, 17]), 8, 3, 1), drawn[[5, 17]])
    for other in (draw(torch.arange(100), 8, 4, 1), draw(torch.arange(100), 8, 3, 2)):
        assert not torch.equal(other, drawn[:100])


def test_a_switch_gate_as_published_weighs_by_noisy_logits() -> None:
    """specs/llama_moe.md 3.3: z + Gumbel noise, the largest of which is both the choice and its weight."""
    moe = MoEConfig(num_experts=E, top_k=1, expert_hidden_size=8, gate="linear", score="logit", learned_scale=True)
    router = Router(moe, 16, 0)
    torch.nn.init.normal_(router.w_in)
    torch.nn.init.constant_(router.scale, 2.0)
    router.gumbel_seed = 1
    x, numbers = torch.randn(9, 16), torch.arange(9)
    noisy, plain = router(x, numbers), router(x)
    best = (plain.logits_TE + gumbel(numbers, E, 1, 0)).max(dim=1, keepdim=True)
    assert torch.equal(noisy.ids_TK, best.indices)
    assert torch.equal(noisy.weights_TK, 2.0 * best.values)
    assert torch.equal(plain.weights_TK, 2.0 * plain.logits_TE.max(dim=1, keepdim=True).values)
    noisy.weights_TK.sum().backward()
    torch.testing.assert_close(router.scale.grad, best.values.sum().view(1))


def test_a_router_adds_noise_to_numbered_tokens_alone() -> None:
    moe = MoEConfig(num_experts=E, top_k=K, expert_hidden_size=8, gate="linear", gate_noise=True)
    router = Router(moe, 16, 0)
    torch.nn.init.normal_(router.w_in)
    torch.nn.init.zeros_(router.w_noise)
    router.add_noise(seed=1)
    x, numbers = torch.randn(9, 16), torch.arange(9)
    assert router(x).noise is None
    noisy = router(x, numbers)
    assert noisy.noise is not None
    assert noisy.noise.deviation_TE.unique().tolist() == pytest.approx([math.log(2) + 0.01])
    torch.testing.assert_close(noisy.logits_TE - noisy.noise.clean_TE, (math.log(2) + 0.01) * normal(numbers, E, 1, 0))
    part = router(x[3:5], numbers[3:5])
    assert torch.equal(part.logits_TE, noisy.logits_TE[3:5])
    noisy.weights_TK[:, 0].sum().backward()
    assert router.w_noise.grad is not None
    assert router.w_noise.grad.any()


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), max_size=12), st.floats(0.1, 3))
def test_an_expert_serves_the_first_tokens_up_to_its_capacity(ids: list[list[int]], factor: float) -> None:
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    counts = torch.arange(len(ids)) % 4 != 3
    kept = Capacity(factor, None)(ids_TK, 5, counts)
    most = math.ceil(int(counts.sum()) * 2 * (factor / 5) - 1e-6)
    served: dict[int, int] = {}
    for token, row in enumerate(ids):
        for k, expert in enumerate(row):
            wanted = bool(counts[token]) and served.get(expert, 0) < most
            assert bool(kept[token, k]) == wanted
            served[expert] = served.get(expert, 0) + bool(counts[token])


@pytest.mark.parametrize("name", [*KINDS, "noise", "load and noise", "load under c2r", "capacity_factor"])
def test_what_losses_keep_for_the_backward_is_predicted(name: str) -> None:
    lists = random_lists(32, random.Random(0))
    rule = {"rule": "c2r", "top_t": 5, "lists": [lists]} if name == "load under c2r" else {}
    sizes = {"num_experts": 32, "top_k": K, "expert_hidden_size": 8}
    moe = MoEConfig(**sizes, gate="linear", gate_noise=True, routing=RoutingConfig(**rule))
    asked: dict[str, Any] = {"switch": 1.0, name.split()[0]: 1.0}
    if name.startswith(("noise", "load")):
        asked |= {"noise": True}
    data = {"train": "text", "sequence_length": 16, "batch_size": 4}
    sections = {"model": {"checkpoint": "m"}, "data": data, "train": {"steps": 1}, "output": {"folder": "r"}}
    found, predicted = [], []
    for balance in ({"switch": 1.0}, asked):
        config = make_config({**sections, "balance": balance}, "a test")
        predicted.append(Part(config, MODEL.model_copy(update={"moe": moe}), 1).layer(0, Passed(1, 1, 0, 1)).total)
        found.append(kept_by(moe, config.balance))
    assert found[1] - found[0] == predicted[1] - predicted[0]


def kept_by(moe: MoEConfig, asked: BalanceSection) -> int:
    """Bytes that autograd saves in one pass of a layer over 4 rows of 16 tokens, but for its weights."""
    layer = MoELayer(moe, 32, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.losses = tuple(kind for _, kind in losses_of(asked).values())
    if asked.noise:
        layer.router.add_noise(0)
    if asked.capacity_factor:
        layer.router.capacity = Capacity(100.0, None)  # drops nothing: rows are the same
    known = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, torch.arange(64), num_rows=4)
    return sum(storage.nbytes() for key, storage in saved.items() if key not in known)
