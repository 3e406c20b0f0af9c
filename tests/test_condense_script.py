"""launch/condense.sh on small models: what it leaves, what it does not do twice, and what it asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_tools.forward import outputs
from checkpoint_tools.source import open_source
from tests.condense_cases import KINDS, condensable, corpus
from tests.test_hf_modeling import load
from tests.texts import VOCABULARY

ROOT = Path(__file__).parents[1]


def condense(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script, from elsewhere and with names relative to there."""
    return subprocess.run(
        [ROOT / "launch" / "condense.sh", *map(str, arguments)],
        env={**os.environ, "EP_PYTHON": sys.executable},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_command_leaves_a_smaller_model_and_searches_once(kind: str, tmp_path: Path) -> None:
    condensable(tmp_path, kind)
    corpus(tmp_path)
    done = condense(tmp_path, "model", "out", 2, 2, "corpus")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    names = {"weights.json", "experts.json", "layers.json", "checkpoint", "hf"}
    assert {path.name for path in out.iterdir()} == names
    order = json.loads((out / "layers.json").read_text())
    assert len(order) == 2
    assert [len(row) for row in json.loads((out / "experts.json").read_text()).values()] == [2, 2, 2]
    source, hf = open_source(out / "checkpoint"), load(out / "hf")
    first = {"deepseek": 1, "qwen": 0}[kind]
    assert sorted(source.config.condensed) == sorted(first + index for index in order)
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = dict(outputs(source.config, source.tensors, ids))["logits"]
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, logits, rtol=1e-4, atol=1e-4)

    # Lists that are there are taken as they are: others than the search would find, and one layer is enough.
    found = {name: (out / name).read_bytes() for name in ("weights.json", "layers.json")}
    other = {str(layer): [5, 0] for layer in range(3)}
    (out / "experts.json").write_text(json.dumps(other))
    again = condense(tmp_path, "model", "out", 1, 2, "corpus")
    assert again.returncode == 0, again.stderr
    assert {name: (out / name).read_bytes() for name in found} == found
    assert json.loads((out / "experts.json").read_text()) == other
    assert sorted(open_source(out / "checkpoint").config.condensed) == [first + order[0]]
    assert {path.name for path in out.iterdir()} == names


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
