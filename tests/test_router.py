"""Selection rules: by hand, against the plain loop, and the guarantees they give."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from ep_engine.errors import UserError
from ep_engine.model_config import MoEConfig
from ep_engine.router import Router
from ep_engine.selection import C2R, C2RGrouped, TopK
from tests.routing_cases import routing_cases, select_by_hand

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "c2r" / "golden_routing.json"
# Published list of layer 0 of LLaMA-MoE-3.5B 2/8 (UNITES-Lab/c2r-moe, MIT licence).
LLAMA_LAYER_0 = [
    [int(expert) for expert in str(row)]
    for row in (31657240, 36704521, 47615302, 61074523, 57261304, 74106235, 31405276, 51430267)
]
LLAMA_CHOICES = {
    1: [[3, 6], [1, 3], [6, 3], [4, 5]],
    2: [[3, 1], [1, 3], [6, 1], [4, 5]],
    3: [[3, 1], [1, 3], [6, 1], [4, 5]],
    5: [[3, 4], [1, 0], [6, 0], [4, 5]],
    7: [[3, 4], [1, 0], [6, 0], [4, 0]],
}


def golden_logits(num_experts: int) -> torch.Tensor:
    """3 sin(0.37 (j + 1)(t + 1) + 0.11 t) of four tokens, made up for these numbers."""
    t, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(num_experts, dtype=torch.float64)[None, :]
    return (3 * torch.sin(0.37 * (j + 1) * (t + 1) + 0.11 * t)).float()


@pytest.mark.parametrize("top_t", LLAMA_CHOICES)
def test_c2r_chooses_the_golden_experts(top_t: int) -> None:
    assert C2R(2, LLAMA_LAYER_0, top_t).select(golden_logits(8)).tolist() == LLAMA_CHOICES[top_t]


def test_golden_weights_of_llama_moe() -> None:
    moe = MoEConfig(num_experts=8, top_k=2, expert_hidden_size=1, gate="linear", score_scale=4.0)
    router = Router(moe, 8, 0)
    router.rule = C2R(2, LLAMA_LAYER_0, 5)
    torch.nn.init.eye_(router.w_in)
    routing = router(golden_logits(8))
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([2.103724, 1.896276]), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden routings are not beside this checkout")
@pytest.mark.parametrize(("model", "num_experts"), [("llama", 8), ("qwen", 60)])
def test_published_lists_choose_the_golden_experts(model: str, num_experts: int) -> None:
    lists = np.load(GOLDEN.parent / f"{model}_collaborative_list.npz")["collaborative_list"][0]
    golden = json.loads(GOLDEN.read_text())[model]
    logits_TE = golden_logits(num_experts)
    for name, case in golden["cases"].items():
        ids_TK = C2R(golden["k"], torch.tensor(lists), int(name.removeprefix("T="))).select(logits_TE)
        # As sets after the first, the top-1 expert: the published rule leaves the others unsorted.
        assert [(row[0], set(row)) for row in ids_TK.tolist()] == [(row[0], set(row)) for row in case["idx"]], name
        if model == "qwen":  # weights of that family: softmax over all experts
            weights_TK = logits_TE.softmax(dim=1).gather(1, ids_TK)
            torch.testing.assert_close(weights_TK.sum(dim=1), torch.tensor(case["sum_w"]), rtol=0, atol=1e-6)


@given(case=routing_cases())
def test_every_rule_is_the_plain_loop(case: dict[str, Any]) -> None:
    scores, k, lists, device, top_t, m = (case[name] for name in ("scores", "k", "lists", "device", "top_t", "m"))
    scores_TE = torch.tensor(scores).float()
    assert TopK(k).select(scores_TE).tolist() == [select_by_hand(s, k, None, 0, None, 0) for s in scores]
    assert C2R(k, lists, top_t).select(scores_TE).tolist() == [
        select_by_hand(s, k, lists, top_t, None, 0) for s in scores
    ]
    assert C2RGrouped(k, lists, device, m, top_t).select(scores_TE).tolist() == [
        select_by_hand(s, k, lists, top_t, device, m) for s in scores
    ]


@given(case=routing_cases())
def test_a_token_never_touches_more_than_m_devices(case: dict[str, Any]) -> None:
    rule = C2RGrouped(case["k"], case["lists"], case["device"], case["m"], case["top_t"])
    for ids in rule.select(torch.tensor(case["scores"]).float()).tolist():
        assert len(set(ids)) == case["k"]
        assert len({case["device"][expert] for expert in ids}) <= case["m"]


@given(case=routing_cases())
def test_the_longest_list_is_plain_top_k(case: dict[str, Any]) -> None:
    scores_TE = torch.tensor(case["scores"]).float()
    plain = TopK(case["k"]).select(scores_TE)
    assert torch.equal(C2R(case["k"], case["lists"]).select(scores_TE), plain)
    assert torch.equal(C2R(case["k"], case["lists"], len(case["lists"]) - 1).select(scores_TE), plain)


def test_no_tokens_choose_no_experts() -> None:
    for rule in (TopK(2), C2R(2, LLAMA_LAYER_0, 3), C2RGrouped(2, LLAMA_LAYER_0, [0, 1] * 4)):
        assert rule.select(torch.empty(0, 8)).shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: C2R(3, LLAMA_LAYER_0, 1), r"routing.top_t \(1\) must be in k-1..E-1 = 2..7"),
        (lambda: C2R(2, LLAMA_LAYER_0, 8), r"routing.top_t \(8\) must be in k-1..E-1 = 1..7"),
        (lambda: C2R(2, [row[:3] for row in LLAMA_LAYER_0], 4), r"\(4\) .* lists of 3 must be as long"),
        (lambda: C2R(2, [[0, 1, 2], [1, 0, 2], [2, 0, 1]], 1), r"expert 0 must name others of the 3 .* got \[0, 1"),
        (lambda: C2R(2, [[1, 1, 0], [0, 2, 1], [0, 1, 2]], 2), r"of expert 0 must name others .* each once"),
        (lambda: C2R(2, [[1, 7, 0], [0, 2, 1], [0, 1, 2]], 2), r"of expert 0 must name others of the 3 experts"),
        (lambda: C2RGrouped(3, LLAMA_LAYER_0, range(8), 2), r"max_devices \(2\) devices may hold only 2 experts"),
        (lambda: C2RGrouped(2, LLAMA_LAYER_0, [0] * 7), "lists of 7 and devices of 8 experts, got 7 and 7"),
        (lambda: C2RGrouped(2, [row[:3] for row in LLAMA_LAYER_0], [0] * 8), "lists of 7 .* got 3"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def by_hand(router: Router, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Weights of each token's experts, in float64."""
    logits = x.double() @ router.w_in.double().T
    if router.w_out is not None:
        logits = torch.tanh(logits) @ router.w_out.double().T
    return F.softmax(logits.sort(dim=1, descending=True).values[:, :2], dim=1) * scale


@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_weights_are_a_softmax_over_the_chosen_in_float32(gate: str) -> None:
    moe = MoEConfig(num_experts=6, top_k=2, expert_hidden_size=1, gate=gate, score_scale=3.0)  # type: ignore[arg-type]
    router = Router(moe, 16, 0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(20, 16).bfloat16()
    routing = router(x)
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK.double(), by_hand(router, x, 3.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.full((20,), 3.0))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_cosine_gate_is_the_posterior_of_a_mixture_of_gaussians(temperature: float) -> None:
    """specs/dense2moe.md 3: a softmax of exp(t) u c, of unit vectors, is one of -|u - c|^2 / 2 exp(t)."""
    router = Router(MoEConfig(num_experts=8, top_k=2, expert_hidden_size=1, gate="cosine", gate_hidden_size=4), 6, 0)
    for weight in router.parameters():
        torch.nn.init.normal_(weight)
    torch.nn.init.constant_(router.temperature, temperature)
    x_TD = torch.randn(50, 6)
    u_TR = F.normalize((x_TD @ router.w_in.T).double(), dim=1).detach()
    c_ER = F.normalize(router.w_out.double(), dim=1).detach()
    distance_TE = (u_TR[:, None] - c_ER[None]).square().sum(dim=2)
    expected_TE = (-distance_TE / 2 * math.exp(temperature)).softmax(dim=1)
    found_TE = router.logits(x_TD).softmax(dim=1).detach()
    torch.testing.assert_close(found_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
    assert temperature > 0 or float(found_TE.max()) < math.e / (math.e + 7 / math.e) < 0.52
