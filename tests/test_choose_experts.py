"""The fused choice of experts against the plain rules: ids, weights, gradients, and logits that are no numbers."""

import random
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_engine import ops, reference
from ep_engine.router import Router
from tests.small_models import random_lists

SCORES = ("softmax", "softmax_of_chosen", "sigmoid", "logit")


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A rule with its tables, and a seed for logits; K = E, one expert and no token among them."""
    num_experts = draw(st.sampled_from([1, 2, 3, 8, 12, 33, 64]))
    rule = draw(st.sampled_from(["topk", "group_limited", "c2r", "c2r_grouped"]))
    num_groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if num_experts % n == 0]))
    group_size = num_experts // num_groups
    top_k = draw(st.sampled_from([k for k in (1, 2, 3, 4, 6, 8, 11, 16) if k <= num_experts]))
    return {
        "rule": rule,
        "num_experts": num_experts,
        "top_k": top_k,
        "num_groups": num_groups,
        "max_groups": draw(st.integers(-(-top_k // group_size), num_groups)),
        "group_top": draw(st.integers(1, 2)),
        "top_t": draw(st.integers(top_k - 1, num_experts - 1)),
        "score": draw(st.sampled_from(SCORES)),
        "renormalise": draw(st.booleans()),
        "with_bias": draw(st.booleans()),
        "num_tokens": draw(st.sampled_from([0, 1, 15, 16, 37])),
        "seed": draw(st.integers(0, 9999)),
    }


def selection(case: dict[str, Any], bias_E: Tensor | None) -> ops.Selection:
    num_experts = case["num_experts"]
    lists = random_lists(num_experts, random.Random(case["seed"]))
    groups = [e % case["num_groups"] for e in range(num_experts)]
    random.Random(case["seed"]).shuffle(groups)
    listed, grouped = case["rule"].startswith("c2r"), case["rule"] == "c2r_grouped"
    return ops.Selection(
        case["top_k"],
        case["rule"],
        score=case["score"],
        renormalise=case["renormalise"] and case["score"] != "logit",
        scale=1.5,
        bias_E=bias_E,
        lists_EN=torch.tensor(lists, dtype=torch.int32).view(num_experts, -1)[:, : num_experts - 1].contiguous()
        if listed
        else None,
        group_of_E=torch.tensor(groups, dtype=torch.int32) if grouped else None,
        top_t=case["top_t"] if listed else 0,
        num_groups=case["num_groups"],
        max_groups=case["max_groups"],
        group_top=case["group_top"] if case["rule"] == "group_limited" else 1,
    )


def plain_ids(case: dict[str, Any], how: ops.Selection, scores_TE: Tensor) -> list[list[int]]:
    num_experts = case["num_experts"]
    tables: dict[str, Any] = {}
    if how.lists_EN is not None:
        tables = {"partners": how.lists_EN.tolist(), "top_t": how.top_t}
    if case["rule"] == "c2r_grouped":
        assert how.group_of_E is not None
        tables |= {"group_of": how.group_of_E.tolist(), "max_groups": how.max_groups}
    if case["rule"] == "group_limited":
        size = num_experts // how.num_groups
        tables = {"group_of": [e // size for e in range(num_experts)], "max_groups": how.max_groups}
        tables["group_top"] = how.group_top
    return [reference.select(scores, how.top_k, **tables) for scores in scores_TE.tolist()]


@given(case=cases())
def test_ids_weights_and_gradients_are_the_plain_ones(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["num_tokens"], case["num_experts"]
    # Multiples of 1/8: equal ones are equal also after a bias is added, and scores of different ones differ.
    logits_TE = torch.randint(-40, 40, shape, generator=generator) / 8
    bias_E = torch.zeros(shape[1]) if case["with_bias"] else None
    how = selection(case, bias_E)
    ids_TK, weights_TK = ops.choose_experts(logits_TE, how)
    scores_TE = logits_TE
    if bias_E is not None or how.group_top > 1:  # by the scores as they were computed, whose last bits may tie or not
        every = torch.arange(shape[1]).expand(shape).contiguous()
        score = how.score if how.score in ("sigmoid", "logit") else "softmax"
        if shape[1] <= 32:
            scores_TE = ops.choose_experts(logits_TE, ops.Selection(shape[1], "given", score), every)[1]
        else:
            return  # more than may be chosen: the scores cannot be read
    assert ids_TK.tolist() == plain_ids(case, how, scores_TE)

    wide = logits_TE.double().requires_grad_()
    expected = reference.weigh(wide, ids_TK, how.score, renormalise=how.renormalise, scale=how.scale)
    torch.testing.assert_close(weights_TK.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    grad_TK = torch.randn(ids_TK.shape, generator=generator)
    expected.backward(grad_TK.double())
    found = ops.choose_experts_backward(grad_TK, logits_TE, ids_TK, how)
    torch.testing.assert_close(found.double(), wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["topk", "group_limited", "c2r", "c2r_grouped"])
def test_a_bias_changes_the_choice_and_not_the_weights(rule: str) -> None:
    case = {"rule": rule, "num_experts": 8, "top_k": 2, "num_groups": 2, "max_groups": 1, "group_top": 2}
    case |= {"top_t": 5, "score": "sigmoid", "renormalise": False, "with_bias": True, "seed": 3}
    logits_TE, bias_E = torch.randn(64, 8), torch.tensor([0.0, 0, 0, 0, 0, 0, 5.0, 0])
    plain, biased = (ops.choose_experts(logits_TE, selection(case, bias)) for bias in (None, bias_E))
    assert (biased[0][:, 0] == 6).all()
    assert not (plain[0][:, 0] == 6).all()
    torch.testing.assert_close(biased[1], 1.5 * logits_TE.sigmoid().gather(1, biased[0]))


@pytest.mark.parametrize("rule", ["topk", "group_limited", "c2r", "c2r_grouped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_ids_are_distinct_and_in_range_whatever_the_logits_are(rule: str, value: float) -> None:
    case = {"rule": rule, "num_experts": 12, "top_k": 4, "num_groups": 3, "max_groups": 1, "group_top": 1}
    case |= {"top_t": 7, "score": "softmax", "renormalise": True, "with_bias": False, "seed": 3}
    for share, num_tokens in product((0.3, 0.9, 1.0), (5, 16)):
        logits_TE = torch.randn(num_tokens, 12)
        logits_TE[torch.rand(num_tokens, 12) < share] = value
        ids_TK, _ = ops.choose_experts(logits_TE, selection(case, None))
        assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids_TK.tolist())


def test_given_ids_are_weighed_again_with_the_same_bits_and_gradients() -> None:
    from tests.moe_cases import make_layer

    router: Router = make_layer(8, 2, 1).router
    x_TD = torch.randn(50, 36)
    first = router(x_TD)
    again = router(x_TD, first.ids_TK)
    assert torch.equal(first.ids_TK, again.ids_TK)
    assert torch.equal(first.weights_TK, again.weights_TK)
    grads = [
        torch.autograd.grad(r.weights_TK.square().sum(), router.w_in, retain_graph=True)[0] for r in (first, again)
    ]
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"top_k": 9}, "top_k must be in 1"),
        ({"rule": "c2r"}, "C2R needs lists"),
        ({"rule": "group_limited", "num_groups": 3}, "num_groups must divide the experts"),
        ({"rule": "group_limited", "num_groups": 2, "max_groups": 3}, "max_groups must be in 1..num_groups"),
        ({"bias_E": torch.zeros(7)}, "bias must have 8 elements, got 7"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        ops.choose_experts(torch.randn(3, 8), ops.Selection(2)._replace(**change))
