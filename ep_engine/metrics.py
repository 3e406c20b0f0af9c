"""The lines of a run: metrics.jsonl for programs, and the same numbers as TensorBoard events for people."""

import json
from pathlib import Path
from typing import Any

from ep_engine.output import whole_file


class Metrics:
    """Written by one rank, line by line; a line is in the file before the next step begins."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run does again, and the half of one that a killed run left."""
        if self._path.exists():
            whole = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            with whole_file(self._path) as beside:
                beside.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; `step` is in it."""
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

            # Events of steps that are done again are hidden.
            self._writer = SummaryWriter(str(self._folder), purge_step=line["step"])
        for name, value in numbers_in(line):
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.close()


def numbers_in(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line but its step, nested ones as `name/key`."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += numbers_in(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and f"{prefix}{name}" != "step":
            found.append((f"{prefix}{name}", float(value)))
    return found
