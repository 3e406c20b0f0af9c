"""Which job made a run folder: ranks that torchrun starts again must go on in it, those of any other job are refused.

torchrun's count of restarts does not tell them apart. An agent whose own ranks still ran when those of another node
failed starts them again without counting, and an agent in the place of a lost one begins to count at 0. The id of the
rendezvous is the same for all of them.
"""

import os
from pathlib import Path

_NO_ID = "none"  # what torchrun calls a job without --rdzv-id


def mark(run_folder: Path) -> None:
    """Note this job in a run folder that it has made, or goes on in."""
    (run_folder / "job").write_text(_this_job(), encoding="utf-8")


def has_begun(run_folder: Path) -> bool:
    """Whether this job was at work in the folder before, so that its ranks have been started again.

    Without an id of its own a job is recognised only where torchrun has counted a restart.
    """
    try:
        maker = (run_folder / "job").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return False
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return maker == _this_job() and (maker != _NO_ID or counted)


def tell_stopped(local_rank: int) -> None:
    """Tell launch/torchrun.py that ranks which were signalled have saved and end well, which torchrun never says."""
    marker = os.environ.get("EP_STOPPED_FILE")
    if marker is not None and local_rank == 0:
        Path(marker).touch()


def _this_job() -> str:
    return os.environ.get("TORCHELASTIC_RUN_ID", _NO_ID)
