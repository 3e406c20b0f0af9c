"""Placement watch: is the placement in use still a good one for what the routers do now?

One rank asks the solver beside training, in a thread of the lowest priority, and tells when it is done.
"""

import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ep_engine.c2r.collaboration import Profile, drift, read_profile
from ep_engine.c2r.locality import Counted, fraction_inside
from ep_engine.c2r.place import LOAD_CAP, search_layer
from ep_engine.c2r.solver import Effort
from ep_engine.placement import Placement

ALARM = 0.05  # share of pairs
SECONDS = 60.0  # of one look
_LEAST_PRIORITY = 19


def stored_profile(path: Path | None) -> Profile | None:
    """The profile of a run's rule; None if it has none, or published lists in its place."""
    return None if path is None or path.suffix in (".json", ".pkl") else read_profile(path)


class PlacementWatch:
    """Of one run.

    Args:
        placement: in use.
        stored: the profile that the run's lists were made from; None: there is none.
    """

    def __init__(self, placement: Placement, stored: Profile | None) -> None:
        self._placement, self._stored = placement, stored
        self._thread: threading.Thread | None = None
        self._found: dict[str, Any] | None = None

    def look(self, recent: Profile, step: int) -> None:
        """Begin to compare; while the last look still lasts nothing is begun."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._compare, args=(recent, step), daemon=True)
        self._thread.start()

    def take(self, *, wait: bool = False) -> dict[str, Any] | None:
        """What the last look found, once; None if nothing is new."""
        if wait and self._thread is not None:
            self._thread.join()
        found, self._found = self._found, None
        return found

    def _compare(self, recent: Profile, step: int) -> None:
        with suppress(OSError):  # of this thread alone, where the system can do that
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        self._found = compare(self._placement, recent, step, self._stored)


def compare(placement: Placement, recent: Profile, step: int, stored: Profile | None) -> dict[str, Any]:
    """The placement in use beside one solved for the last steps, by the share of pairs inside devices.

    Returns:
        `step`, `in_use`, `solved`, means over layers that have pairs; `drift` from the stored profile, if there is one;
        and `alarm`, a sentence, if what could be won is more than ALARM.
    """
    devices, nodes = placement.devices, placement.nodes
    effort = Effort.for_experts(recent.num_experts, seed=0, seconds=SECONDS / recent.num_layers)
    in_use, solved = [], []
    for layer in range(recent.num_layers):
        of = Counted(recent.counts_of_layer[layer], recent.load_of_layer[layer], recent.top_k)
        if not of.counts_EE.any():
            continue
        found, _ = search_layer(of, devices, nodes, "pairs", LOAD_CAP, effort)
        in_use.append(fraction_inside(of.counts_EE, placement.device_of_expert(layer)))
        solved.append(fraction_inside(of.counts_EE, found.device_of_expert))
    result: dict[str, Any] = {
        "step": step,
        "in_use": float(np.mean(in_use)) if in_use else math.nan,
        "solved": float(np.mean(solved)) if solved else math.nan,
    }
    if stored is not None:
        result["drift"] = drift(stored.counts_of_layer, recent.counts_of_layer)
    if in_use and result["solved"] - result["in_use"] > ALARM:
        result["alarm"] = (
            f"the placement in use has {result['in_use']:.1%} of the pairs of the last steps inside devices, one "
            f"solved for them {result['solved']:.1%}; `ep-engine place --from-run` solves again, and output.resume "
            "moves the experts"
        )
    return result
