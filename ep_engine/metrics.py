"""The lines of a run: metrics.jsonl for programs, and the same numbers as TensorBoard events for people."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.errors import Fault
from ep_engine.output import whole_file


class Metrics:
    """Written by one rank, line by line; a line is in the file before the next step begins.

    Args:
        folder: of the run.
        project: of Weights & Biases, which is sent the numbers too; None: nothing is sent.
    """

    def __init__(self, folder: Path, project: str | None = None) -> None:
        self._project = project
        self._sent_to: Any = None
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
        if "layers" in line:
            self._writer.add_image("load", load_picture(line["layers"]), line["step"], dataformats="HW")
        self._writer.flush()
        if self._project is not None:
            self._send(dict(numbers_in(line)), line["step"])

    def _send(self, numbers: dict[str, float], step: int) -> None:
        import wandb  # the user's own

        try:
            if self._sent_to is None:
                self._sent_to = wandb.init(project=self._project, name=self._path.parent.name, dir=self._path.parent)
            self._sent_to.log(numbers, step=step)
        except wandb.errors.Error as error:
            words = str(error).splitlines()[0]
            raise Fault(
                f"output.wandb: {words}; log in with `wandb login`, set WANDB_MODE=offline, or leave it out"
            ) from error

    def close(self) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.close()
        if self._sent_to is not None:
            self._sent_to.finish()


def load_picture(layers: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Layers by experts: the load of each as a share of twice the mean of its layer, which is white, as is more."""
    picture = np.zeros((len(layers), max(len(layer["load"]) for layer in layers)))
    for row, layer in zip(picture, layers, strict=True):
        load = np.array(layer["load"])
        row[: len(load)] = np.minimum(load / (2 * load.mean()), 1.0)
    return picture


def numbers_in(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line but its step, nested ones as `name/key`, those of a layer as `name/layer_3/key`."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += numbers_in(value, f"{prefix}{name}/")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for of_layer in value:
                rest = {key: number for key, number in of_layer.items() if key != "layer"}
                found += numbers_in(rest, f"{prefix}{name}/layer_{of_layer['layer']}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and f"{prefix}{name}" != "step":
            found.append((f"{prefix}{name}", float(value)))
    return found
