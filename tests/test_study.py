"""The study on a tiny scale: every stage, real processes, and a second call that trains nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import Study, StudySizes, main
from benchmarks.study_report import UNTOLD, best, in_words, is_done, judge, rivals_of
from ep_engine.errors import UserError

TINY = StudySizes(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    sequence_length=32,
    batch_size=4,
    heldout_batches=2,
    parent_steps=4,
    steps=4,
    tune_steps=2,
    seeds=1,
    profile_tokens=512,
    cluster_tokens=64,
    num_experts=16,
    top_k=4,
    copies=4,
    top_t=(5,),
    max_devices=(1,),
    devices=2,
    files=60,
)
CONSTRUCTIONS = ["random", "clustering", "gradient", "residual", "upcycled", "upcycled-halves"]
RULES = ["topk", "placed", "c2r T5", "grouped M1", "group_limited M1"]


def test_a_difference_counts_if_all_seeds_agree() -> None:
    """Differences by hand: 0.1, 0.3, 0.2; then 0.1, -0.1, 0.3, whose spread holds 0."""
    worse = judge([2.1, 3.3, 2.7], [2.0, 3.0, 2.5])
    assert worse["distinguishable"]
    assert (worse["mean"], worse["least"], worse["largest"]) == pytest.approx((0.2, 0.1, 0.3))
    assert in_words(worse) == "+0.2000"
    mixed = judge([2.1, 2.9, 2.8], [2.0, 3.0, 2.5])
    assert not mixed["distinguishable"]
    assert mixed["mean"] == pytest.approx(0.1)
    assert in_words(mixed) == UNTOLD
    assert in_words(judge([1.5, 2.5], [2.0, 3.0])) == "-0.5000"


def test_one_seed_and_equal_losses_tell_nothing() -> None:
    assert not judge([1.0], [2.0])["distinguishable"]
    assert not judge([1.0, 2.0], [1.0, 3.0])["distinguishable"]
    assert not judge([2.000001, 3.000001], [2.0, 3.0])["distinguishable"]  # what float32 rounds
    assert judge([2.0001, 3.0001], [2.0, 3.0])["distinguishable"]
    with pytest.raises(ValueError, match="shorter"):
        judge([1.0, 2.0], [1.0])


def test_the_best_is_named_with_those_that_may_be_as_good() -> None:
    ends = {"a": [2.0, 3.0], "b": [2.1, 2.95], "c": [2.2, 3.1]}
    arms = {name: [{"end": end} for end in found] for name, found in ends.items()}
    assert best(arms, ["a", "b", "c"], "end") == {"best": "a", UNTOLD: ["b"]}
    assert best(arms, ["b", "c"], "end") == {"best": "b", UNTOLD: []}


def test_constructions_are_judged_at_their_own_flops() -> None:
    rivals = rivals_of(CONSTRUCTIONS)
    assert rivals["random"] == rivals["residual"] == ["dense, tokens", "dense, FLOPs of split"]
    assert rivals["upcycled"] == ["dense, tokens", "dense, FLOPs of upcycled"]
    assert rivals["upcycled-halves"] == ["dense, tokens"]


def test_a_run_that_was_stopped_is_not_done(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 4)
    for steps, loss, done in ((4, 2.5, True), (3, 2.5, False), (4, None, False)):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": steps, "heldout_loss": loss}))
        assert is_done(tmp_path, 4) is done


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="holds no study; choose another --out"):
        Study(tmp_path, TINY).run()
    (tmp_path / "sizes.json").write_text("{}")
    with pytest.raises(UserError, match="holds a study of other sizes; choose another --out, or delete it"):
        Study(tmp_path, TINY).run()
    assert (tmp_path / "mine").read_text() == "x"


def test_a_study_of_few_seeds_goes_on_with_more(tmp_path: Path) -> None:
    Study(tmp_path, TINY)._claim()
    Study(tmp_path, replace(TINY, seeds=2))._claim()
    with pytest.raises(UserError, match="of other sizes"):
        Study(tmp_path, replace(TINY, steps=5))._claim()


def test_a_mistake_is_a_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.setattr("sys.argv", ["study", "--smoke", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{tmp_path} is there and holds no study; choose another --out\n"


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, Any]]:
    study = Study(tmp_path_factory.mktemp("study") / "out", TINY)
    return study, study.run()


@pytest.mark.slow
def test_all_arms_have_their_figures(studied: tuple[Study, dict[str, Any]]) -> None:
    study, results = studied
    dense = ["dense, tokens", "dense, FLOPs of split", "dense, FLOPs of upcycled"]
    assert list(results["runs"]["constructions"]) == [*dense, *CONSTRUCTIONS]
    assert list(results["runs"]["rules"]) == RULES
    assert study.trained == 1 + 3 + len(CONSTRUCTIONS) + len(RULES) == study._runs()
    for name, (run,) in (results["runs"]["constructions"] | results["runs"]["rules"]).items():
        assert run["curve"][0] == [0, run["start"]]
        assert run["curve"][-1] == [run["tokens"], run["end"]]
        assert ("bytes" in run) == (name not in dense)
    assert (study.out / "study.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(results)


@pytest.mark.slow
def test_the_start_is_where_the_parent_and_the_base_ended(studied: tuple[Study, dict[str, Any]]) -> None:
    """What runs evaluate at their end and what is evaluated before the next are the same rows."""
    runs = studied[1]["runs"]
    end = studied[1]["parent"]["end"]
    for name in ("dense, tokens", "upcycled", "upcycled-halves"):  # these begin as the parent
        assert runs["constructions"][name][0]["start"] == pytest.approx(end, rel=1e-5)
    base = runs["constructions"]["gradient"][0]["end"]
    for name in ("topk", "placed"):
        assert runs["rules"][name][0]["start"] == pytest.approx(base, rel=1e-5)


@pytest.mark.slow
def test_rivals_have_the_same_tokens_or_the_same_flops(studied: tuple[Study, dict[str, Any]]) -> None:
    (runs,) = ({name: run for name, (run,) in studied[1]["runs"]["constructions"].items()},)
    assert {runs[name]["tokens"] for name in [*CONSTRUCTIONS, "dense, tokens"]} == {4 * 4 * 32}
    for name, of in (("dense, FLOPs of split", "random"), ("dense, FLOPs of upcycled", "upcycled")):
        step = runs[name]["gflop"] / runs[name]["steps"]
        assert abs(runs[name]["gflop"] - runs[of]["gflop"]) <= step / 2 + 1e-12
    assert studied[1]["runs"]["rules"]["grouped M1"][0]["devices"] == 1


@pytest.mark.slow
def test_a_second_call_trains_nothing_and_a_lost_run_is_made_again(studied: tuple[Study, dict[str, Any]]) -> None:
    study, results = studied
    again = Study(study.out, TINY)
    assert again.run() == results
    assert again.trained == 0
    (study.out / "runs/placed-0/summary.json").unlink()  # as if it had been ended in the middle
    once_more = Study(study.out, TINY)
    repeated = once_more.run()["runs"]["rules"]["placed"][0]
    assert once_more.trained == 1
    assert repeated["end"] == results["runs"]["rules"]["placed"][0]["end"]
