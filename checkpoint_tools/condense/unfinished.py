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
from checkpoint_tools.conversion import state_of
from ep_engine.errors import UserError
from ep_engine.mesh import World, process_groups


class Unfinished:
    """What an interrupted search has left, if the same search goes on, with the same model as it is in its folder.

    Attributes:
        found: by name; empty for a search that begins.
    """

    def __init__(self, out: Path, tool: str, model: Path, about: Mapping[str, Any], *, resume: bool) -> None:
        self._path = out.with_name(f".{out.name}.unfinished")
        # Without hidden files, for this one may lie in the folder.
        state = [one for one in state_of(model) if not Path(one[0]).name.startswith(".")]
        self._about = fingerprint({"tool": tool, "model": str(model.resolve()), "state": state, **about})
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


def fingerprint(value: Any) -> str:
    """sha256 of what JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def ranks_of(world: World, timeout_s: float) -> Iterator[dist.ProcessGroup | None]:
    """All ranks that torchrun has started; None: this process is alone."""
    if world.size == 1:
        yield None
        return
    with process_groups(world, torch.device("cpu"), 1, timeout_s) as meshes:
        yield meshes.world
