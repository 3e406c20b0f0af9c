"""`ep-engine`, of which a rank, or the torchrun of its node, is killed once: after DIES_AFTER steps on rank DIES_ON.

DIES_ON=3 DIES_AFTER=5 DIES=rank DIED=/path/that/then/exists python -m tests.dying_run train RUN.toml
"""

import os
import signal
import time
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ep_engine.cli import main

_steps = 0


def _die(optimizer: Optimizer, args: object, kwargs: object) -> None:
    global _steps
    _steps += 1
    died = Path(os.environ["DIED"])
    on, after = int(os.environ["DIES_ON"]), int(os.environ["DIES_AFTER"])
    if int(os.environ["RANK"]) == on and _steps == after and not died.exists():
        died.touch()
        os.kill(os.getpid() if os.environ["DIES"] == "rank" else os.getppid(), signal.SIGKILL)
        time.sleep(600)  # as still as a machine that is gone


if __name__ == "__main__":
    register_optimizer_step_post_hook(_die)
    main()
