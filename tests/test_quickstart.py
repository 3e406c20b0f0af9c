"""The quickstart on a small scale: real text, real processes, every file it promises."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ep_engine.errors import UserError
from ep_engine.quickstart import Sizes, quickstart
from tests.small_models import run_tool

SMALL = Sizes(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    sequence_length=32,
    batch_size=8,
    dense_steps=40,
    expert_steps=10,
    arm_steps=10,
    heldout_batches=2,
    profile_tokens=2048,
    corpus_files=30,
)
ARMS = ("plain", "placed", "c2r", "c2r_grouped")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, quickstart(out, SMALL)


@pytest.mark.slow
def test_summary_has_the_promised_figures(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    assert json.loads((out / "summary.json").read_text()) == summary
    assert tuple(summary["arms"]) == ARMS
    for arm in summary["arms"].values():
        figures = ("heldout_loss", "bytes_per_token", "devices_per_token", "load_max_over_mean", "tokens_per_second")
        assert all(arm[name] > 0 for name in figures)
        assert sum(arm["bytes_by_direction"].values()) == pytest.approx(arm["bytes_per_token"])
        assert sum(arm["bytes_by_layer"]) == pytest.approx(arm["bytes_per_token"])
    assert summary["dense"]["unigram_entropy"] > 4
    assert 0 < summary["peak_gib"] < 6
    assert summary["seconds"] > 0


@pytest.mark.slow
def test_each_arm_sends_fewer_bytes_than_the_one_before(run: tuple[Path, dict[str, Any]]) -> None:
    arms = run[1]["arms"]
    for more, fewer in pairwise(ARMS):
        assert arms[fewer]["bytes_per_token"] < arms[more]["bytes_per_token"], (more, fewer)
    assert arms["c2r_grouped"]["devices_per_token"] == 1.0
    # One row per copy: every copy that is not at home travels, as 4 * D bytes each way and a slot.
    plain = arms["plain"]
    copies = plain["remote_rows_per_token"]["plain"]
    assert plain["bytes_by_direction"]["combine"] == pytest.approx(copies * 4 * SMALL.hidden_size * SMALL.num_layers)


@pytest.mark.slow
def test_same_routing_gives_the_same_loss_and_only_c2r_changes_it(run: tuple[Path, dict[str, Any]]) -> None:
    arms = run[1]["arms"]
    assert arms["placed"]["heldout_loss"] == pytest.approx(arms["plain"]["heldout_loss"], rel=1e-4)
    assert arms["plain"]["changed_share"] == arms["placed"]["changed_share"] == 0.0
    assert 0 < arms["c2r"]["changed_share"] < 1


@pytest.mark.slow
def test_everything_is_in_the_run_folder(run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    out, summary = run
    for name in (
        "profile.npz",
        "placement.json",
        "report.html",
        "dense-hf/config.json",
        "c2r-hf/modeling_llama_moe.py",
    ):
        assert (out / name).is_file(), name
    assert run_tool("verify", max((out / "c2r/checkpoints").iterdir()), out / "c2r-hf") == 0
    config = json.loads((out / "c2r-hf/config.json").read_text())
    assert (config["routing_rule"], config["top_t"]) == ("c2r", 3)
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, None)  # those of the tokenizer, not LLaMA's
    assert summary["generated"].startswith("def __init__(self")
    assert len(summary["generated"]) > len("def __init__(self")
    page = (out / "report.html").read_text()
    assert len(re.findall("data:image/png;base64", page)) == 4
    assert f"{summary['arms']['c2r']['heldout_loss']:.4f}" in page


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match=r"is not empty \(1 entries\); choose another or pass --overwrite"):
        quickstart(tmp_path, SMALL)
    assert (tmp_path / "mine").read_text() == "kept"
