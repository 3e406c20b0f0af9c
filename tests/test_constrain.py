"""Constraints beyond the plain rules: groups, limits of each layer, tightening, weights, and what is told before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_tools.export import export
from checkpoint_tools.verify import verify
from ep_engine import reference
from ep_engine.c2r.constrain import in_no_list
from ep_engine.checkpoint import newest
from ep_engine.config import BalanceSection
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig, read_model_config
from ep_engine.router import Router
from ep_engine.selection import C2RGrouped, GroupLimited, TopK, make_rule
from tests.routing_cases import routing_cases, select_by_hand
from tests.run_cases import losses, moe_folder, small_run, train_here
from tests.run_files import make_files, resolve_run
from tests.small_models import dense_folder, moe_checkpoint, routing_tables

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@given(
    scores=st.lists(st.lists(st.integers(0, 5), min_size=12, max_size=12), min_size=1, max_size=4),
    groups=st.sampled_from([1, 2, 3, 4, 6, 12]),
    data=st.data(),
)
def test_group_limited_is_the_plain_loop(scores: list[list[int]], groups: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, m * 12 // groups))
    group_of = [e * groups // 12 for e in range(12)]
    expected = [reference.select(row, k, group_of=group_of, max_groups=m, group_top=1) for row in scores]
    assert GroupLimited(k, 12, groups, m).select(torch.tensor(scores).float()).tolist() == expected
    assert [select_by_hand(row, k, None, 0, group_of, m) for row in scores] == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((2, 12, 5, 1), r"num_groups \(5\) must divide 12 experts"),
        ((2, 12, 4, 5), r"max_devices \(5\) must be in 1..4"),
        ((2, 12, 4, 0), r"max_devices \(0\) must be in 1..4"),
        ((4, 12, 4, 1), r"max_devices \(1\) groups of 3 experts hold fewer than top_k \(4\)"),
    ],
)
def test_groups_that_cannot_hold_the_experts_are_refused(arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        GroupLimited(*arguments)


def moe(routing: dict[str, Any], **others: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 8, "top_k": 2, "expert_hidden_size": 6, "routing": routing, **others})


@pytest.mark.parametrize("rule", ["c2r", "c2r_grouped", "group_limited"])
def test_every_layer_may_have_limits_of_its_own(rule: str) -> None:
    tables = routing_tables(rule)
    limits = {"top_t": [1, 5], "max_devices": [1, 2]}
    tables |= {name: value for name, value in limits.items() if name in tables}
    scores_TE = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        lists = tables["lists"][layer] if "lists" in tables else None
        groups = [e // 2 for e in range(8)] if rule == "group_limited" else None
        devices = tables["device_of_expert"][layer] if rule == "c2r_grouped" else groups
        top_t, m = limits["top_t"][layer], limits["max_devices"][layer]
        expected = [select_by_hand(row, 2, lists, top_t, devices, m) for row in scores_TE.tolist()]
        assert make_rule(moe(tables), layer).select(scores_TE).tolist() == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"top_t": [3]}, "routing.top_t has 1 layers, the placement 2; correct it"),
        ({"top_t": [3, 8]}, r"routing.top_t \(8\) must be in k-1..E-1 = 1..7"),
        ({"top_t": [0, 3]}, r"routing.top_t \(0\) must be in k-1..E-1 = 1..7"),
        ({"max_devices": [1, 2, 2]}, "routing.max_devices has 3 layers, the placement 2; correct it"),
    ],
)
def test_limits_of_other_layers_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(num_layers=2, moe=moe(routing_tables("c2r_grouped") | change), **SIZES)
    if len(change.get("top_t", [])) == 1:
        with pytest.raises(ValueError, match=r"routing\.top_t has 1 layers, the model has 2; make it for"):
            ModelConfig(num_layers=2, moe=moe(routing_tables("c2r") | change), **SIZES)


@pytest.mark.parametrize(
    ("groups", "m", "sentence"),
    [
        (3, 1, r"num_groups \(3\) must divide the 8 experts"),
        (None, 1, r"num_groups \(None\) must divide the 8 experts"),
        (8, 1, r"max_devices \(1\) of 8 groups hold 1 experts, it must be in 1..8 and hold top_k \(2\)"),
        (4, [2, 5], r"max_devices \(5\) of 4 groups"),
    ],
)
def test_a_model_with_impossible_groups_is_refused(groups: int | None, m: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        moe({"rule": "group_limited", "num_groups": groups, "max_devices": m})


@given(case=routing_cases(), done=st.floats(-1, 2))
def test_tightening_goes_from_plain_top_k_to_the_rule(case: dict[str, Any], done: float) -> None:
    scores_TE = torch.tensor(case["scores"]).float()
    k, lists, device, m, t = (case[name] for name in ("k", "lists", "device", "m", "top_t"))
    rule = C2RGrouped(k, lists, device, m, t)
    goal = rule.select(scores_TE)
    rule.tighten(0.0)
    assert torch.equal(rule.select(scores_TE), TopK(k).select(scores_TE))
    rule.tighten(done)
    now, all_devices = rule.on(torch.device("cpu")), len(set(device))
    assert t <= now.top_t <= len(lists) - 1
    assert min(m, all_devices) <= now.max_groups <= all_devices
    expected = [select_by_hand(row, k, lists, now.top_t, device, now.max_groups) for row in case["scores"]]
    assert rule.select(scores_TE).tolist() == expected
    rule.tighten(1.0)
    assert torch.equal(rule.select(scores_TE), goal)


def test_rules_without_limits_have_nothing_to_tighten() -> None:
    scores_TE = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    for done in (0.0, 0.5, 1.0):
        plain, limited = TopK(3), GroupLimited(3, 8, 4, 2)
        plain.tighten(done)
        assert torch.equal(plain.select(scores_TE), TopK(3).select(scores_TE))
        limited.tighten(done)
        assert limited.on(scores_TE.device).max_groups == {0.0: 4, 0.5: 3, 1.0: 2}[done]


def router_of(weights: str, score: str = "softmax", **others: Any) -> Router:
    tables = routing_tables("c2r", top_t=2, num_layers=1) | {"weights": weights}
    router = Router(moe(tables, score=score, score_scale=2.0, gate="linear", **others), 16, 0)
    torch.nn.init.normal_(router.w_in, generator=torch.Generator().manual_seed(1))
    return router


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_have_the_sum_of_plain_top_k(score: str) -> None:
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    found = router_of("match_plain_mass", score)(x_TD)
    bare = router_of("model", score)(x_TD)
    scores_TE = found.logits_TE.softmax(dim=1) if score == "softmax" else found.logits_TE.sigmoid()
    mass_T = 2.0 * scores_TE.topk(2, dim=1).values.sum(dim=1)
    assert torch.equal(found.ids_TK, bare.ids_TK)
    torch.testing.assert_close(found.weights_TK.sum(dim=1), mass_T)
    torch.testing.assert_close(found.weights_TK / found.weights_TK.sum(1, keepdim=True),
                               bare.weights_TK / bare.weights_TK.sum(1, keepdim=True))  # fmt: skip
    assert (bare.weights_TK.sum(dim=1) < mass_T - 1e-3).any()


def test_weights_of_the_selected_sum_to_the_scale() -> None:
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    found = router_of("selected")(x_TD)
    torch.testing.assert_close(found.weights_TK.sum(dim=1), torch.full((50,), 2.0))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_of_matched_weights_are_those_of_the_formula(score: str) -> None:
    router = router_of("match_plain_mass", score)
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    given_TK = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    found = router(x_TD)
    (found.weights_TK * given_TK).sum().backward()

    x2_TD, w_ED = x_TD.detach().double().requires_grad_(), router.w_in.detach().double().requires_grad_()
    logits_TE = x2_TD @ w_ED.T
    scores_TE = logits_TE.softmax(dim=1) if score == "softmax" else logits_TE.sigmoid()
    chosen_TK = scores_TE.gather(1, found.ids_TK)
    plain_TK = scores_TE.gather(1, logits_TE.topk(2, dim=1).indices)
    weights_TK = 2.0 * chosen_TK * (plain_TK.sum(1, keepdim=True) / chosen_TK.sum(1, keepdim=True))
    torch.testing.assert_close(found.weights_TK.double(), weights_TK, rtol=1e-5, atol=1e-6)
    (weights_TK * given_TK.double()).sum().backward()
    torch.testing.assert_close(x_TD.grad.double(), x2_TD.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(router.w_in.grad.double(), w_ED.grad, rtol=1e-4, atol=1e-5)


def test_matched_weights_of_a_token_do_not_depend_on_its_fellows() -> None:
    router = router_of("match_plain_mass")
    x_TD = torch.randn(33, 16, generator=torch.Generator().manual_seed(4))
    whole = router(x_TD).weights_TK
    for part in (slice(0, 1), slice(5, 12), slice(32, 33)):
        assert torch.equal(router(x_TD[part]).weights_TK, whole[part])


@pytest.mark.parametrize(
    "others",
    [{"score": "softmax_of_chosen"}, {"score": "softmax", "renormalise": True}],
    ids=["softmax of chosen", "renormalised"],
)
@pytest.mark.parametrize("weights", ["selected", "match_plain_mass"])
def test_weights_that_change_nothing_are_refused(weights: str, others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"routing.weights {weights} has no effect on rule c2r, score softmax"):
        moe(routing_tables("c2r") | {"weights": weights}, **others)
    with pytest.raises(ValueError, match="has no effect on rule topk"):
        moe({"rule": "topk", "weights": weights}, score="softmax")


def test_experts_in_nobodys_list_are_named() -> None:
    first = [[1, 2, 3, 0], [0, 2, 3, 1], [0, 1, 3, 2], [0, 1, 2, 3]]
    second = [[3, 2, 1, 0], [2, 3, 0, 1], [1, 3, 0, 2], [0, 1, 2, 3]]
    routing = {"rule": "c2r", "top_t": [1, 1], "lists": [first, second]}
    config = ModelConfig(num_layers=2, moe=moe(routing, num_experts=4), **SIZES)
    assert in_no_list(config) == {0: [2, 3]}
    wide = config.model_copy(update={"moe": moe(routing | {"top_t": 3}, num_experts=4)})
    assert in_no_list(wide) == {}
    assert in_no_list(config.model_copy(update={"moe": None})) == {}


@pytest.mark.parametrize("rule", ["c2r", "c2r_grouped", "group_limited"])
def test_limits_of_layers_go_to_transformers_and_back(rule: str, tmp_path: Path) -> None:
    tables = routing_tables(rule)
    tables |= {name: value for name, value in {"top_t": [2, 6], "max_devices": [1, 2]}.items() if name in tables}
    if rule == "group_limited":
        tables["num_groups"] = 2
    checkpoint = moe_checkpoint(tmp_path / "moe", dense_folder(tmp_path / "dense"), routing=tables)
    export(checkpoint, tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert {name: written[name] for name in ("top_t", "max_devices") if name in tables} == {
        name: tables[name] for name in ("top_t", "max_devices") if name in tables
    }
    assert verify(checkpoint, tmp_path / "hf").same  # weights, routing and logits


def test_a_run_file_says_all_of_it(files: Path, tmp_path: Path) -> None:
    rule = ("routing.rule=group_limited", "routing.num_groups=4", "routing.max_devices=[1,2]")
    run = resolve_run(files, tmp_path, *rule, "routing.tighten_steps=5")
    assert run.model.moe is not None
    assert run.model.moe.routing == RoutingConfig(rule="group_limited", num_groups=4, max_devices=[1, 2])
    lists = ("routing.rule=c2r", "routing.profile={files}/profile.npz", "routing.top_t=[2,4]")
    found = resolve_run(files, tmp_path, *lists).model.moe
    assert found is not None
    assert found.routing.top_t == [2, 4]


REFUSED = {
    "no groups": (("routing.rule=group_limited",), r"routing.num_groups \(None\) must divide the 8 experts"),
    "groups of c2r": (
        ("routing.rule=c2r", "routing.profile={files}/profile.npz", "routing.top_t=3", "routing.num_groups=2"),
        r"routing\.num_groups has no effect on routing\.rule c2r",
    ),
    "tightening nothing": (("routing.rule=topk", "routing.tighten_steps=2"), r"routing\.tighten_steps has no effect"),
    "weights of LLaMA-MoE": (
        ("routing.rule=group_limited", "routing.num_groups=4", "routing.weights=selected"),
        r"routing\.weights selected has no effect on rule group_limited, score softmax_of_chosen",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused(name: str, files: Path, tmp_path: Path) -> None:
    overrides, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        resolve_run(files, tmp_path, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("runs"))


def tightening(folder: Path, name: str, **train: Any) -> Any:
    routing = {"rule": "c2r", "top_t": 1, "profile": str(folder / "profile.npz"), "tighten_steps": 6}
    sections = {"model": {"checkpoint": str(folder / "moe")}, "routing": routing}
    return small_run(folder, name, **sections, train={"steps": 8, "learning_rate": 3e-3, **train})


def test_a_run_that_tightens_resumes_with_the_same_bits(folder: Path) -> None:
    """Stopped in the middle of the schedule, which the step alone decides."""
    whole = tightening(folder, "tight")
    train_here(whole)
    cut = tightening(folder, "cut", steps=8, save_every=3)
    train_here(cut)
    later = cut.output.folder / "checkpoints"
    for path in sorted(later.iterdir())[1:]:
        path.rename(folder / f"gone-{path.name}")
    train_here(cut.model_copy(update={"output": cut.output.model_copy(update={"resume": True})}))
    assert losses(cut) == losses(whole)
    steady = tightening(folder, "steady")
    steady = steady.model_copy(update={"routing": steady.routing.model_copy(update={"tighten_steps": 0})})
    train_here(steady)
    assert losses(steady)[0] != losses(whole)[0]
    newest_whole = newest(whole.output.folder)
    assert newest_whole is not None
    stored = read_model_config(newest_whole / "model.json").moe
    assert stored is not None
    assert stored.routing.top_t == 1  # the goal, whatever the step


def test_the_balance_loss_may_count_plain_choices(folder: Path) -> None:
    found = {}
    for counted in ("rule", "plain"):
        config = tightening(folder, f"balance-{counted}")
        balance = BalanceSection(switch=1.0, switch_of=counted)
        routing = config.routing.model_copy(update={"tighten_steps": 0})
        config = config.model_copy(update={"routing": routing, "balance": balance})
        train_here(config)
        found[counted] = losses(config)
    assert found["rule"][0] == found["plain"][0]  # the loss itself, before a step was taken
    assert found["rule"][2:] != found["plain"][2:]
