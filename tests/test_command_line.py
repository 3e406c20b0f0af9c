"""How commands end: the exit status, one sentence on stderr, and which rank says it."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable

import pytest
import typer

from ep_engine import command_line
from ep_engine.command_line import exit_with_sentence, print_json
from ep_engine.errors import Fault, UserError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["tool"])


def end(body: Callable[[], object]) -> tuple[int, float]:
    """Exit status of a command that only runs `body`, and the seconds it took."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def only() -> None:
        body()

    started = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        exit_with_sentence(app)
    return int(stopped.value.code or 0), time.perf_counter() - started


def raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


DISK = OSError(errno.EIO, os.strerror(errno.EIO), "/data/train.bin")
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "user's mistake": (UserError("a (3) must divide b (4)"), 2, "a (3) must divide b (4)\n"),
    "fault": (Fault("step 7: the loss is nan"), 1, "step 7: the loss is nan\n"),
    "fault of all": (Fault("the disk is full", everywhere=True), 1, "the disk is full\n"),
    "operating system": (DISK, 1, "/data/train.bin: Input/output error\n"),
    "operating system, no file": (OSError("no more processes"), 1, "the operating system: no more processes\n"),
    "several lines": (UserError("one\n  sentence"), 2, "one sentence\n"),
    "wrong call": (typer.BadParameter("must be even."), 2, "Invalid value: must be even; see --help\n"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_command_ends_with_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, status, sentence = ENDS[name]
    assert end(raises(error))[0] == status
    assert capsys.readouterr() == ("", sentence)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=["ctrl-c", "abort"])
def test_an_interrupted_command_says_so(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(raises(error))[0] == 130
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("interrupted")


def test_a_command_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(lambda: None)[0] == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="what was believed"):
        exit_with_sentence(_broken())


def _broken() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def only() -> None:
        raise AssertionError("what was believed")

    return app


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, 2.5], "b": None})
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": [1, 2.5], "b": None}, "")


@pytest.mark.parametrize(
    "error", [UserError("same on all"), Fault("same on all", everywhere=True)], ids=["user", "fault"]
)
def test_the_first_rank_speaks_first(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "_FIRST_RANK_SPEAKS_S", 0.5)
    seconds = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status, seconds[rank] = end(raises(error))
        assert status == type(error).exit_status
        assert capsys.readouterr().err == "same on all\n"  # said in the end even if the first rank had nothing to say
    assert seconds["0"] < 0.5 <= seconds["1"]


def test_a_rank_with_a_fault_of_its_own_speaks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_FIRST_RANK_SPEAKS_S", 60.0)
    monkeypatch.setenv("RANK", "3")
    status, seconds = end(raises(Fault("lost rank 2")))
    assert status == 1
    assert seconds < 30
