"""What holds for every test: seeds, and marks that skip by themselves."""

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings

from ep_engine.cli import app
from ep_engine.command_line import exit_with_sentence

# The same examples on every run; no deadline, because the first call of an op can be slow.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`run("place", ...)` is `ep-engine place ...` in this process: exit status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ep-engine", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            exit_with_sentence(app)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
