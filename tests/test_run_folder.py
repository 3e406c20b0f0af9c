"""One writer per run folder, by processes as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ep_engine.config import RunConfig, to_toml
from ep_engine.errors import UserError
from ep_engine.run_folder import LOCK, check_unused, empty, locked
from tests.run_cases import small_run, write_text

ROOT = Path(__file__).parents[1]
REFUSAL = r"^output.folder .*/run is being written by another run; choose another folder, or end that run first$"


def _command(config: RunConfig, *arguments: str) -> list[str]:
    file = config.output.folder.with_suffix(".toml")
    file.write_text(to_toml(config))
    return [sys.executable, "-P", "-m", "ep_engine.cli", "train", str(file), *arguments]


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    write_text(tmp_path)
    config = small_run(tmp_path, "run", train={"steps": 1_000_000, "save_every": 5, "log_every": 1000})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(_command(config), env=environment, stderr=subprocess.DEVNULL)
    try:
        _wait_for(tmp_path / "run/checkpoints/step_000005")
        for arguments in (["--overwrite"], ["output.resume=true"], ["--overwrite", "--check-for", "1"]):
            second = subprocess.run(_command(config, *arguments), env=environment, capture_output=True, text=True)
            assert second.returncode == 2
            assert second.stderr.count("\n") == 1
            assert "is being written by another run" in second.stderr
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    check_unused(tmp_path / "run")
    end = _command(config, "--overwrite", "train.steps=2", "train.warmup_steps=1")
    assert subprocess.run(end, env=environment, capture_output=True).returncode == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_and_leaves_whole_checkpoints(tmp_path: Path) -> None:
    write_text(tmp_path)
    config = small_run(tmp_path, "run", train={"steps": 1_000_000, "save_every": 1, "log_every": 1000})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(_command(config), env=environment, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "run/checkpoints/step_000003")
    run.send_signal(signal.SIGINT)
    _, words = run.communicate(timeout=30)
    assert run.returncode == 130
    assert words.splitlines()[-1] == "interrupted; what stood before still stands"
    assert list((tmp_path / "run/checkpoints").glob(".*")) == []


def test_the_lock_keeps_others_out_and_goes_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_unused(folder)
    with locked(folder):
        with pytest.raises(UserError, match=REFUSAL):
            check_unused(folder)
        with pytest.raises(UserError, match=REFUSAL), locked(folder):
            pytest.fail("two runs hold the lock")
    check_unused(folder)


def test_the_holder_of_the_lock_deletes_what_dead_processes_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in (".step_000003.partial-77", ".step_000001.partial-5", "step_000002"):
        (folder / "checkpoints" / name / "weights").mkdir(parents=True)
    (folder / ".summary.partial-77.json").touch()
    with locked(folder):
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", LOCK]
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]
        empty(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
