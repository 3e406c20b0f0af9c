"""torchrun for several nodes: ranks that it starts again do not meet dead ones, and nodes that do not meet say so.

Signalled, it has the ranks save and ends with their status, 0; torchrun alone would end with 1.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError, RendezvousError
from torch.distributed.run import main

# A store that outlives the ranks keeps the addresses of dead ones, and never tells an agent in the place of a lost one
# where it is (torch 2.13, pytorch/pytorch issue 135712). So every start gets a store of its own.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
# Seconds between SIGTERM and SIGKILL: torchrun's 30 may be too few for a save.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")


def run() -> None:
    """Run torchrun; ranks leave a file if they were stopped, have saved and end well."""
    with tempfile.TemporaryDirectory() as folder:
        stopped = Path(folder) / "stopped"
        os.environ["EP_STOPPED_FILE"] = str(stopped)
        try:
            main()
        except SignalException as error:
            if error.sigval != signal.SIGTERM or not stopped.exists():
                raise


if __name__ == "__main__":
    try:
        run()
    except RendezvousError as error:
        if isinstance(error, RendezvousClosedError):
            why = "another node has given up, see what it said"
        elif isinstance(error, RendezvousConnectionError):
            why = "the first node cannot be reached, or is gone"
        else:  # RendezvousTimeoutError has no text of its own
            why = "not all nodes came in time; see that each one started"
        sys.exit(f"the nodes did not meet ({type(error).__name__}): {why}")
