"""Figures and pictures of a split."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from checkpoint_tools.split_report import describe_split, draw_split, overlaps, read_split
from tests.small_models import dense_folder, run_tool
from tests.test_split import write_importance

RECORD = {
    "method": "gradient",
    "num_experts": 2,
    "residual_experts": 1,
    "intermediate_size": 8,
    "neurons": [[[0, 1], [2, 3], [3, 4]], [[0, 1], [2, 3], [4, 5]]],
}


def test_figures_are_those_of_the_lists() -> None:
    found = describe_split(RECORD)
    assert (found["smallest_expert"], found["largest_expert"]) == (2, 2)
    assert found["neurons_in_several"] == 1 / 16
    assert found["neurons_in_none"] == 5 / 16
    assert overlaps(RECORD)[0].tolist() == [[1, 0, 0], [0, 1, 0.5], [0, 0.5, 1]]
    assert found["overlap"] == pytest.approx(1 / 12)


def test_the_picture_shows_overlap_sizes_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_folder(tmp_path / "dense")
    scores = write_importance(tmp_path / "scores", torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0)))
    split = ("--method", "gradient", "--importance", scores, "--assignment", "shared", "--num-experts", 4, "--top-k", 2)
    assert run_tool("split", dense, tmp_path / "moe", *split) == 0
    figure = draw_split(read_split(tmp_path / "moe"))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.allclose(shown, overlaps(read_split(tmp_path / "moe")).mean(axis=0))
    plt.close(figure)
    capsys.readouterr()
    picture = ("--picture", tmp_path / "split.png", "--importance", scores, "--json")
    assert run_tool("describe-split", tmp_path / "moe", *picture) == 0
    assert json.loads(capsys.readouterr().out)["neurons_in_several"] > 0
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
    for arguments, sentence in (
        ((dense,), "give a checkpoint that `split` has made"),
        ((tmp_path / "moe", "--picture", tmp_path / "x.gif"), "must end in .png, .svg or .pdf"),
        ((tmp_path / "moe", "--picture", tmp_path / "split.png"), "exists; choose another name or pass --overwrite"),
        ((tmp_path / "moe", "--importance", scores), "has no effect without --picture"),
    ):
        assert run_tool("describe-split", *arguments) == 2
        assert sentence in capsys.readouterr().err
