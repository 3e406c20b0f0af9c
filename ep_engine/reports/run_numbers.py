"""What a run folder tells: the lines of its metrics, and what stands beside them; what is not there is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ep_engine.c2r.collaboration import read_profile
from ep_engine.checkpoint import newest
from ep_engine.errors import Fault, UserError
from ep_engine.whole_model import read_model

T = TypeVar("T")


def read_run(folder: Path) -> dict[str, Any]:
    """Plain values of a run that has ended, still goes on, or was resumed.

    Returns:
        `settings`, the texts of its run files by name; `resumed_at`, steps; `lines` of metrics.jsonl; `summary`;
        `coactivation`, the counts [L][E][E] of profile.npz, E that of each layer, and what it says of itself; `gates`,
        the checkpoint whose gates they are and the cosines [E][E] of the rows of each layer with experts; the last
        three None if they are not there. `missing`: a sentence for each file that is not there or cannot be read.

    Raises:
        UserError: the folder is none of a run, or metrics.jsonl is damaged.
    """
    if not any((folder / name).is_file() for name in ("run.toml", "metrics.jsonl")):
        raise UserError(f"{folder} is no run folder (no run.toml, no metrics.jsonl); name the output.folder of a run")
    missing: list[str] = []
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        missing.append("metrics.jsonl has no line yet: a run writes one every train.log_every steps")
    if not (folder / "run.toml").is_file():
        missing.append("run.toml is not there: nothing says what was asked for")
    summary = _read(
        folder / "summary.json", lambda path: json.loads(path.read_text()), missing, "the run has not ended"
    )
    coactivation = gates = None
    if not lines or "layers" in lines[-1]:
        why = "it is written after a save, where output.watch is set"
        coactivation = _read(folder / "profile.npz", _coactivation, missing, why)
    checkpoint = newest(folder)
    if checkpoint is None:
        missing.append("checkpoints holds none: gates are read from the last one")
    else:
        gates = _read(checkpoint, _gates, missing, "it was deleted meanwhile")
    settings = {path.name: path.read_text(encoding="utf-8") for path in _run_files(folder)}
    return {
        "run": str(folder),
        "settings": settings,
        "resumed_at": [_step(name) for name in settings if name != "run.toml"],
        "lines": lines,
        "summary": summary,
        "coactivation": coactivation,
        "gates": gates,
        "missing": missing,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is being written; none if the file is not there."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path} line {number} is no line of metrics ({line.strip()[:40]!r}); take it out"
            ) from None
    return lines


def series(lines: list[dict[str, Any]], *keys: str) -> tuple[list[float], list[float]]:
    """Steps and values of what stands under nested keys, of the lines that have it as a finite number."""
    steps, values = [], []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(line["step"])
            values.append(value)
    return steps, values


def names_under(lines: list[dict[str, Any]], key: str) -> list[str]:
    """The names of the dictionaries that lines have under a key, in the order of their first use."""
    return list(dict.fromkeys(name for line in lines for name in line.get(key, {})))


def loads_of(lines: list[dict[str, Any]], most: int) -> tuple[list[int], list[tuple[int, NDArray[np.float64]]]]:
    """Loads of experts over time, relative to the mean of their layer: 1 is what each had if all had the same.

    Returns:
        The last step of every column, at most `most`, several lines being summed where there are more; and for each
        layer its number and (E, columns).
    """
    told = [line for line in lines if "layers" in line]
    columns = [list(part) for part in np.array_split(np.arange(len(told)), min(most, len(told)))] if told else []
    layers = []
    for i, layer in enumerate(told[-1]["layers"] if told else []):
        summed = [np.sum([told[n]["layers"][i]["load"] for n in part], axis=0) for part in columns]
        layers.append((layer["layer"], np.stack([load / max(load.mean(), 1e-9) for load in summed], axis=1)))
    return [told[part[-1]]["step"] for part in columns], layers


def _read(path: Path, read: Callable[[Path], T], missing: list[str], otherwise: str) -> T | None:
    if not path.exists():
        missing.append(f"{path.name} is not there: {otherwise}")
        return None
    try:
        return read(path)
    except (UserError, Fault, ValueError, OSError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return None


def _coactivation(path: Path) -> dict[str, Any]:
    profile = read_profile(path)
    return {"about": profile.about, "counts": [counts_EE.tolist() for counts_EE in profile.counts_of_layer]}


def _gates(checkpoint: Path) -> dict[str, Any] | None:
    model, tensors = read_model(checkpoint)
    layers = []
    for layer in model.moe_layers():
        at = f"layers.{layer}.moe.router"
        rows: Tensor = tensors[f"{at}.w_out" if f"{at}.w_out" in tensors else f"{at}.w_in"]
        rows_ED = F.normalize(rows.float(), dim=1)
        layers.append({"layer": layer, "cosine": (rows_ED @ rows_ED.T).tolist()})
    return {"checkpoint": checkpoint.name, "layers": layers} if layers else None


def _run_files(folder: Path) -> list[Path]:
    later = sorted(folder.glob("run.from-*.toml"), key=lambda path: _step(path.name))
    return [path for path in (folder / "run.toml", *later) if path.is_file()]


def _step(name: str) -> int:
    """Of run.from-STEP.toml."""
    digits = name.removeprefix("run.from-").removesuffix(".toml")
    return int(digits) if digits.isdigit() else 0
