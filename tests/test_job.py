"""Whether a run folder is of the job that finds it: by torchrun's id, which outlives its ranks and its agents."""

from pathlib import Path

import pytest

from ep_engine import job


def set_job(monkeypatch: pytest.MonkeyPatch, name: str | None, restarts: int = 0) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    if name is None:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)


@pytest.mark.parametrize(
    ("maker", "finder", "restarts", "begun"),
    [
        ("a", "a", 1, True),
        ("a", "a", 0, True),  # by an agent that did not count, or in the place of a lost one
        ("a", "b", 0, False),
        ("a", "b", 1, False),  # the first start failed before it came to the folder
        ("none", "none", 1, True),
        ("none", "none", 0, False),  # any other job without an id
        (None, None, 0, False),
        ("a", None, 0, False),
    ],
)
def test_a_folder_is_known_by_the_job_that_made_it(
    maker: str | None, finder: str | None, restarts: int, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_job(monkeypatch, maker)
    job.mark(tmp_path)
    set_job(monkeypatch, finder, restarts)
    assert job.has_begun(tmp_path) == begun


def test_no_job_has_begun_where_nothing_was_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_job(monkeypatch, "a", restarts=1)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert not job.has_begun(path)
