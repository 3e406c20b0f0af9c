"""Blend: published numbers of dynamic weights, shares of domains, and a place that is found again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.data.batches import Batches
from ep_engine.data.blend import Blend, domain_weights, reference_losses, updated_weights
from ep_engine.data.domain_tables import LOSSES, WEIGHTS
from ep_engine.data.tokens import TokenFile, write_token_file
from ep_engine.errors import UserError

SLIMPAJAMA = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")
LENGTH = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenFile]:
    """Domains a, b and c of 20, 7 and 3 windows; a token says where it stands."""
    folder = tmp_path_factory.mktemp("domains")
    for i, (name, windows) in enumerate((("a", 20), ("b", 7), ("c", 3))):
        write_token_file(folder / name, [1000 * i + np.arange(windows * LENGTH + 1)], 70_000)
    return {name: TokenFile(folder / name) for name in "abc"}


def blend(files: dict[str, TokenFile], *weights: float, seed: int = 0) -> Blend:
    return Blend(files, sequence_length=LENGTH, packing="stream", weights=np.array(weights), seed=seed)


def test_dynamic_weights_are_the_published_ones() -> None:
    losses = (1.728, 2.117, 0.705, 1.572, 2.071, 1.287, 1.491)
    weights = domain_weights("llama", SLIMPAJAMA)
    reference = reference_losses("llama2_7b", SLIMPAJAMA)
    code = updated_weights("sheared_llama", weights, np.array(losses), reference)
    assert code == pytest.approx([0.668748, 0.150602, 0.043612, 0.042559, 0.050124, 0.025215, 0.019140], abs=5e-7)
    paper = updated_weights("sheared_llama_paper", weights, np.array(losses), reference)
    assert paper == pytest.approx([0.668204, 0.150469, 0.043563, 0.043279, 0.050070, 0.025180, 0.019235], abs=5e-7)


def test_a_domain_of_weight_0_comes_back_only_by_smoothing() -> None:
    zero, one = np.zeros(2), np.ones(2)
    assert updated_weights("sheared_llama", np.array([0.0, 1.0]), one, zero) == pytest.approx([5e-5, 1 - 5e-5])
    assert updated_weights("sheared_llama_paper", np.array([0.0, 1.0]), one, zero).tolist() == [0.0, 1.0]


def test_tables_are_weights() -> None:
    for name, table in WEIGHTS.items():
        domains = tuple(table)
        assert domain_weights(name, domains[::-1])[::-1].tolist() == list(table.values())  # type: ignore[arg-type]
    # specs/llama_moe.md 4.2 and 4.3, by domain.
    assert WEIGHTS["sheared_llama"] == {
        "en_cc": 0.361, "en_c4": 0.492, "github": 0.008, "en_wikipedia": 0.031, "en_book": 0.091, "en_arxiv": 0.007,
        "en_stack": 0.01,
    }  # fmt: skip
    red = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp")
    for found, published in (
        (WEIGHTS["sheared_llama_pruning"], [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]),
        (WEIGHTS["sheared_llama_continued"], [0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845]),
        (LOSSES["sheared_llama_1.3b"], [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251]),
        (LOSSES["sheared_llama_2.7b"], [1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328]),
    ):
        assert found == dict(zip(red, published, strict=True))
    assert {len(losses) for losses in LOSSES.values()} == {7}
    assert domain_weights("uniform", ("x", "y")).tolist() == [0.5, 0.5]
    assert domain_weights(None, ("x",)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            None,
            r"^data\.train has 3 domains and data\.weights is missing; give a weight for each, or a name: uniform, l",
        ),
        ({"a": 0.5, "b": 0.3, "c": 0.1}, r"^data\.weights sum to 0\.9 and must sum to 1; divide each by 0\.9$"),
        (
            {"a": 1.2, "b": -0.3, "c": 0.1},
            r"^data\.weights of b is -0\.3, and no domain is read less than never; use 0",
        ),
        ({"a": 0.5, "d": 0.5}, r"^data\.weights are of a, d, data\.train of a, b, c; name the same$"),
        ("llama", r"^data\.weights are of en_arxiv, .*, data\.train of a, b, c; name the same$"),
    ],
)
def test_weights_that_are_none_are_refused(given: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        domain_weights(given, ("a", "b", "c"))  # type: ignore[arg-type]


def test_reference_losses_of_other_domains_are_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.reference_losses are of a, data\.train of a, b; name the same$"):
        reference_losses({"a": 1.0}, ("a", "b"))


@given(weights=st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any), count=st.integers(1, 300))
def test_any_run_of_rows_holds_domains_by_their_weights(
    files: dict[str, TokenFile], weights: list[int], count: int
) -> None:
    shares = np.array(weights) / sum(weights)
    rows = blend(files, *shares).ahead(count)
    counts = np.bincount([domain for domain, _ in rows], minlength=3)
    assert (np.abs(counts - shares * count) < 2).all()
    for domain in range(3):  # of a domain every row comes once, in turn
        assert [number for d, number in rows if d == domain] == list(range(counts[domain]))


def test_one_domain_is_read_as_ever(files: dict[str, TokenFile]) -> None:
    batches = Batches(files["a"], sequence_length=LENGTH, batch_size=6, seed=3)
    one = blend({"a": files["a"]}, 1.0, seed=3)
    for step in range(8):
        assert all(map(torch.equal, one.read(one.ahead(6)), batches.batch(step)))
        one.advance(6)


def test_every_row_of_a_domain_comes_once_before_any_comes_again(files: dict[str, TokenFile]) -> None:
    found = blend(files, 0.2, 0.5, 0.3)
    firsts = found.read(found.ahead(100)).inputs_BS[:, 0].tolist()
    of_b = [first - 1000 for first in firsts if 1000 <= first < 2000]
    assert [sorted(of_b[i : i + 7]) for i in (0, 7, 14)] == [[4 * w for w in range(7)]] * 3
    assert of_b[:7] != of_b[7:14]


@given(
    before=st.lists(st.integers(1, 9), max_size=5),
    after=st.integers(1, 40),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
def test_a_place_is_found_again(files: dict[str, TokenFile], before: list[int], after: int, weights: list[int]) -> None:
    shares = np.array(weights) / sum(weights)
    whole, other = blend(files, 0.5, 0.25, 0.25), blend(files, 0.5, 0.25, 0.25)
    for count in before:
        whole.ahead(count + 1)  # what was only looked at changes nothing
        whole.advance(count)
    whole.reweigh(shares)
    other.restore(json.loads(json.dumps(whole.state())), weights=True)
    assert other.ahead(after) == whole.ahead(after)
    assert other.weights_D.tolist() == shares.tolist()
    kept = blend(files, 1.0, 0.0, 0.0)
    kept.restore(whole.state(), weights=False)
    assert kept.weights_D.tolist() == [1.0, 0.0, 0.0]


def test_domains_that_run_dry_are_told(files: dict[str, TokenFile]) -> None:
    found = blend(files, 0.2, 0.3, 0.5)
    assert found.runs_dry(6) is None
    assert found.advance(6) == []  # c has none left
    assert found.runs_dry(2) == "c"
    assert found.advance(20) == ["c", "b"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"seed": 1},
            r"^train\.seed is 0, the checkpoint was made with 1, which orders the data; keep it, or start a new",
        ),
        ({"sequence_length": 9}, r"^data\.sequence_length is 4, the checkpoint was made with 9"),
        ({"packing": "padded"}, r"^data\.packing is stream, the checkpoint was made with padded"),
        (
            {"domains": {"a": {"of": 21}}},
            r"^data\.train has rows \{'a': 20, .*\}, the checkpoint was made with \{'a': 21\}",
        ),
    ],
)
def test_a_place_in_other_data_is_refused(
    files: dict[str, TokenFile], change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        blend(files, 0.2, 0.3, 0.5).restore(blend(files, 0.2, 0.3, 0.5).state() | change, weights=True)


def test_a_domain_without_a_row_is_refused(files: dict[str, TokenFile], tmp_path: Path) -> None:
    write_token_file(tmp_path / "short", [np.arange(3)], 10)
    with pytest.raises(UserError, match=r"short\.bin gives 0 windows of 4 tokens, but 1 are asked for"):
        blend(files | {"d": TokenFile(tmp_path / "short")}, 0.25, 0.25, 0.25, 0.25)
