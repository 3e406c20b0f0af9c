"""Times calls side by side: warm-up, then the candidates in turn, medians and spread."""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import summary
from ep_engine.machine import describe_machine


def time_in_turn(
    calls: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: median, least and largest of `rounds`, the calls taking turns within a round.

    Turns, because a machine that is shared slows down for seconds at a time: that then meets all candidates.
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - started) * 1e3)
    return {name: summary(times) for name, times in found.items()}


def print_table(title: str, times: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    """Show the times and the named ratios of one case."""
    table = Table("", "median ms", "least", "largest", title=title)
    for name, found in times.items():
        table.add_row(name, *(f"{found[key]:.2f}" for key in ("median_ms", "min_ms", "max_ms")))
    console = Console(stderr=True)
    console.print(table)
    console.print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))


def write_results(path: Path | None, question: str, setting: dict[str, Any], results: dict[str, Any]) -> None:
    """Print the results as JSON, with what is needed to repeat them, and write them to `path` if there is one."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    document = {
        "question": question,
        "setting": setting,
        "machine": {
            "processor": describe_machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "results": results,
    }
    text = json.dumps(document, indent=1)
    print(text)  # noqa: T201
    if path is not None:
        path.write_text(text + "\n")
