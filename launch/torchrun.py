"""torchrun for several nodes: ranks that it starts again do not meet dead ones, and nodes that do not meet say so."""

import os
import sys

from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError, RendezvousError
from torch.distributed.run import main

# A store that outlives the ranks keeps the addresses of dead ones, and never tells an agent in the place of a lost one
# where it is (torch 2.13, pytorch/pytorch issue 135712). So every start gets a store of its own.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

if __name__ == "__main__":
    try:
        main()
    except RendezvousError as error:
        if isinstance(error, RendezvousClosedError):
            why = "another node has given up, see what it said"
        elif isinstance(error, RendezvousConnectionError):
            why = "the first node cannot be reached, or is gone"
        else:  # RendezvousTimeoutError has no text of its own
            why = "not all nodes came in time; see that each one started"
        sys.exit(f"the nodes did not meet ({type(error).__name__}): {why}")
