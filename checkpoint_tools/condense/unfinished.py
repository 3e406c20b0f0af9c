"""A search in the making: what was found so far, beside the output, and the ranks that search.

.NAME.unfinished    {"about": what is searched for, "found": what was found}
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_tools.condense.published_json import write_json
from ep_engine.errors import UserError
from ep_engine.mesh import World, process_groups


class Unfinished:
    """What an interrupted search has left, if the same search goes on.

    Attributes:
        found: by name; empty for a search that begins.
    """

    def __init__(self, out: Path, tool: str, about: Mapping[str, Any], *, resume: bool) -> None:
        self._path = out.with_name(f".{out.name}.unfinished")
        self._about = hashlib.sha256(json.dumps({"tool": tool, **about}).encode()).hexdigest()
        self.found: dict[str, Any] = {}
        if not resume or not self._path.exists():
            return
        left = json.loads(self._path.read_text())
        if left["about"] != self._about:
            raise UserError(
                f"what an interrupted run left for {out} is of another model, text, or other options; repeat them, or "
                "leave out --resume"
            )
        self.found = left["found"]

    def keep(self, found: Mapping[str, Any]) -> None:
        """Keep what was found so far."""
        write_json(self._path, {"about": self._about, "found": dict(found)})

    def remove(self) -> None:
        """The output is there."""
        self._path.unlink(missing_ok=True)


@contextmanager
def ranks_of(world: World, timeout_s: float) -> Iterator[dist.ProcessGroup | None]:
    """All ranks that torchrun has started; None: this process is alone."""
    if world.size == 1:
        yield None
        return
    with process_groups(world, torch.device("cpu"), 1, timeout_s) as meshes:
        yield meshes.world
