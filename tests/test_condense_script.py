"""launch/condense.sh on small models: what it leaves, what it does not do twice, and what it asks for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_tools.forward import outputs
from checkpoint_tools.source import open_source
from tests.condense_cases import condensable, corpus
from tests.small_models import run_tool
from tests.test_hf_modeling import load
from tests.texts import VOCABULARY

ROOT = Path(__file__).parents[1]
NAMES = {"weights.json", "experts.json", "layers.json", "checkpoint", "hf"}


def condense(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script, from elsewhere and with names relative to there; `calls` has a line for each start of Python."""
    python = folder / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >>{folder}/calls\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return subprocess.run(
        [ROOT / "launch" / "condense.sh", *map(str, arguments)],
        env={**os.environ, "EP_PYTHON": str(python)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def searches(folder: Path) -> list[str]:
    """Every search that was started, with what started it."""
    lines = (folder / "calls").read_text().splitlines()
    return [line.split(str(folder))[0] for line in lines if re.search(r"condense (weights|experts|layers) ", line)]


@pytest.mark.slow
def test_one_command_and_two_ranks_leave_a_smaller_model(tmp_path: Path) -> None:
    model, text = condensable(tmp_path, "qwen"), corpus(tmp_path)
    done = condense(tmp_path, "model", "out", 2, 2, "corpus", 2)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == NAMES
    two_ranks = f"-P {ROOT}/launch/torchrun.py --standalone --nproc-per-node 2 -m checkpoint_tools condense "
    assert searches(tmp_path) == [f"{two_ranks}{step} " for step in ("weights", "experts", "layers")]

    # What one process finds.
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", tmp_path / "weights") == 0
    by_two, by_one = (json.loads(path.read_text()) for path in (out / "weights.json", tmp_path / "weights"))
    assert by_two.keys() == by_one.keys()
    for expert, (total, count, mean) in by_one.items():  # texts in other batches round differently in float32
        assert by_two[expert] == [pytest.approx(total, rel=1e-5), count, pytest.approx(mean, rel=1e-5)]
    given = ("--corpus", text, "--weights", out / "weights.json", "--experts", 2)
    assert run_tool("condense", "experts", model, *given, "--out", tmp_path / "experts") == 0
    lists = ("--lists", out / "experts.json", "--layers", 2)
    assert run_tool("condense", "layers", model, *given, *lists, "--out", tmp_path / "layers") == 0
    for name in ("experts", "layers"):
        assert json.loads((out / f"{name}.json").read_text()) == json.loads((tmp_path / name).read_text())

    source, hf = open_source(out / "checkpoint"), load(out / "hf")
    assert sorted(source.config.condensed) == sorted(json.loads((out / "layers.json").read_text()))
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = dict(outputs(source.config, source.tensors, ids))["logits"]
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_is_there_is_not_searched_for_again(tmp_path: Path) -> None:
    """Lists that are there are taken as they are: others than the search would find."""
    model, text, out = condensable(tmp_path, "deepseek"), corpus(tmp_path), tmp_path / "out"
    out.mkdir()
    assert run_tool("condense", "weights", model, "--corpus", text, "--out", out / "weights.json") == 0
    (out / "experts.json").write_text(json.dumps({str(layer): [5, 0] for layer in range(3)}))
    kept = {name: (out / name).read_bytes() for name in ("weights.json", "experts.json")}
    first = condense(tmp_path, "model", "out", 2, 2, "corpus")
    assert first.returncode == 0, first.stderr
    assert searches(tmp_path) == ["-P -m checkpoint_tools condense layers "]
    kept["layers.json"] = (out / "layers.json").read_bytes()
    order = json.loads(kept["layers.json"])
    assert sorted(open_source(out / "checkpoint").config.condensed) == sorted(1 + index for index in order)
    again = condense(tmp_path, "model", "out", 1, 2, "corpus")  # one layer is the first of two
    assert again.returncode == 0, again.stderr
    assert len(searches(tmp_path)) == 1
    assert sorted(open_source(out / "checkpoint").config.condensed) == [1 + order[0]]
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert {path.name for path in out.iterdir()} == NAMES


def test_it_says_what_it_needs_and_leaves_nothing(tmp_path: Path) -> None:
    for arguments in (
        ("model", "out", 2, 2),
        ("model", "out", "two", 2, "corpus"),
        ("model", "out", 2, -1, "corpus"),
        ("model", "out", 2, 2, "corpus", 0),
        ("model", "out", 2, 2, "corpus", 1, "more"),
    ):
        done = condense(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr == f"usage: {ROOT / 'launch' / 'condense.sh'} MODEL OUT LAYERS EXPERTS CORPUS [RANKS]\n"


@pytest.mark.slow
def test_too_many_layers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    condensable(tmp_path, "deepseek")
    done = condense(tmp_path, "model", "out", 4, 2, corpus(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--layers (4) must be in 1..3, the model's layers with experts" in done.stderr
    assert not (tmp_path / "out").exists()
