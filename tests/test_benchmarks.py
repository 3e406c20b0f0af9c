"""The benchmarks run, compare the same thing, and write what RESULTS.md needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.timing import time_in_turn

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *command: str) -> dict[str, Any]:
    out = tmp_path / "results.json"
    line = [sys.executable, "-m", *command, "--rounds", "2", "--json", str(out)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}  # a machine's own name need not resolve
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    assert {"question", "setting", "machine", "commit", "date", "results"} <= document.keys()
    return document


def test_calls_take_turns_and_are_warmed_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    found = time_in_turn(calls, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert all(times["min_ms"] <= times["median_ms"] <= times["max_ms"] for times in found.values())


def test_layer_benchmark_compares_equal_outputs(tmp_path: Path) -> None:
    sizes = ("--tokens", "64", "--hidden", "32", "--width", "16", "--experts", "4", "--top-k", "2")
    document = run(tmp_path, "benchmarks.bench_moe_layer", *sizes)
    assert list(document["results"]) == ["ep_engine", "transformers eager", "transformers grouped_mm"]


def test_dispatch_benchmark_counts_fewer_bytes_per_device(tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.bench_dispatch")
    results = run(tmp_path, *torchrun, "--tokens", "64", "--hidden", "16", "--experts", "16")["results"]
    for top_k in (4, 8):
        one, many = (results[f"top-{top_k} {name}"]["bytes_per_token"] for name in ("per_device", "per_expert"))
        assert one < many


@pytest.mark.parametrize("name", ["moe_layer", "dispatch", "quickstart"])
def test_results_in_the_text_are_those_of_the_files(name: str) -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    if name == "quickstart":
        for arm, figures in document["arms"].items():
            row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
            assert f"| {figures['heldout_loss']:.4f} | {figures['bytes_per_token']:.0f} |" in row
    else:
        for found in document["results"].values():
            assert re.search(rf"\| {found['median_ms']:.0f} \({found['min_ms']:.0f}, {found['max_ms']:.0f}\) \|", text)
