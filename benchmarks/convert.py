"""How fast are conversions beside copying the same bytes, and in how much memory?

    python -m benchmarks.convert [--gib 13] [--rounds 5] [--folder DIR] [--tools convert split ...] [--json OUT]

A folder of the shape of LLaMA-2-7B with random weights in bfloat16, in two shards; --gib N takes fewer of its layers.
For every tool, in turns: the conversion, and `cp --reflink=never` of as many bytes with an fsync of every file: of its
source, or, where it is much larger, of its output. Files leave the page cache before each of them. Checksums are on;
the check of weights and logits, which reads everything a second time, is not, unless --checked. Memory is what
processes have of their own (RssAnon and RssShmem), sampled.

    convert   Hugging Face -> engine        split     16 experts, random
    export    split model -> Hugging Face   upcycle   4 experts of half an FFN each
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.timing import write_results
from checkpoint_tools.hf_writer import write_json, write_weights
from ep_engine.deferred import Deferred, Tensors
from ep_engine.draft import Draft

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_attention_heads": 32}
LAYERS, WHOLE_GIB = 32, 12.55
_REST = 5.0  # seconds
_POOL = 1 << 24  # random elements that all weights are cut from
ARGUMENTS = {
    "convert": ["convert", "{source}", "{out}"],
    "split": ["split", "{source}", "{out}", "--num-experts", "16", "--top-k", "4"],
    "upcycle": ["upcycle", "{source}", "{out}", "--num-experts", "4", "--top-k", "2", "--granularity", "2"],
    "export": ["export", "{moe}", "{out}"],
}


def make_source(folder: Path, layers: int) -> None:
    """A dense model; weights are pieces of one pool of random numbers, so that making them takes no time."""
    pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (d, f)}
        shapes |= {f"{at}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (v, d)}

    def piece(number: int, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        rolled = pool.roll(number * 7919)
        return rolled.repeat(-(-count // _POOL))[:count].view(shape)

    deferred = {
        name: Deferred(shape, torch.bfloat16, lambda n=number, s=shape: piece(n, s))  # type: ignore[misc]
        for number, (name, shape) in enumerate(shapes.items())
    }
    tensors = Tensors(deferred)
    folder.mkdir()
    total = sum(one.num_bytes for one in deferred.values())
    draft = Draft(folder)
    write_weights(draft, tensors, total // 2 + (1 << 28))  # two shards
    draft.wait()
    draft.close()
    (folder / "done.json").unlink()
    config = {**SHAPE, "num_hidden_layers": layers, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config})


def leave_cache(*folders: Path) -> None:
    """Have the disk keep all files, and the page cache forget them."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def settle(*folders: Path) -> None:
    """Delete what is not needed any more, and wait until the disk is at rest: it goes on for seconds after that."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    time.sleep(_REST)


class Memory:
    """The most that a process and its children have had of their own, in bytes."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def stop(self) -> int:
        """The peak."""
        self._done.set()
        self._thread.join()
        return self.peak

    def _follow(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, sum(_own(pid) for pid in _tree(self.pid)))


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(one for child in children for one in _tree(int(child)))]


def _own(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def run_tool(tool: str, paths: dict[str, Path], *more: str) -> dict[str, float]:
    """Seconds and peak memory of one conversion, from a cold cache to the disk."""
    arguments = [one.format(**paths) for one in ARGUMENTS[tool]]
    leave_cache(paths["source"], paths["moe"])
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "checkpoint_tools", *arguments, *more], stdout=subprocess.DEVNULL)
    memory = Memory(process.pid)
    status = process.wait()
    seconds, peak = time.perf_counter() - began, memory.stop()
    if status:
        raise SystemExit(f"{tool} ended with {status}")
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def run_copy(source: Path, out: Path) -> float:
    """Seconds of `cp` and of an fsync of what it wrote, from a cold cache."""
    leave_cache(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - began


def measure(tool: str, paths: dict[str, Path], rounds: int, *, checked: bool) -> dict[str, Any]:
    """One row."""
    out, copy = paths["out"], paths["copy"]
    copied = {"export": paths["moe"], "upcycle": out}.get(tool, paths["source"])
    tools, copies = [], []
    num_bytes = 0
    for _ in range(rounds):
        settle(copy)
        tools.append(run_tool(tool, paths, *(() if checked else ("--no-check-logits",))))
        num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        settle(*(() if copied is out else (out,)))
        copies.append(run_copy(copied, copy))
        if copied is out:
            shutil.rmtree(out)
    shutil.rmtree(copy)
    seconds = [one["seconds"] for one in tools]
    ratios = [c / t for c, t in zip(copies, seconds, strict=True)]
    return {
        "gib": num_bytes / 2**30,
        "seconds": statistics.median(seconds),
        "seconds_spread": [min(seconds), max(seconds)],
        "cp_seconds": statistics.median(copies),
        "cp_spread": [min(copies), max(copies)],
        "convert_vs_cp": statistics.median(ratios),
        "convert_vs_cp_spread": [min(ratios), max(ratios)],
        "peak_gib": max(one["peak_gib"] for one in tools),
    }


def main() -> None:
    """Measure all tools and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=WHOLE_GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; needs room for five such models")
    parser.add_argument("--tools", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS))
    parser.add_argument("--checked", action="store_true", help="with the logits check")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers = max(1, min(LAYERS, round((args.gib - 0.49) / (WHOLE_GIB - 0.49) * LAYERS)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = {name: Path(folder) / name for name in ("source", "moe", "out", "copy")}
        make_source(paths["source"], layers)
        paths["moe"].mkdir()
        if "export" in args.tools:
            run_tool("split", {**paths, "out": paths["moe"]}, "--no-check-logits")
        rows = {}
        for tool in args.tools:
            rows[tool] = row = measure(tool, paths, args.rounds, checked=args.checked)
            Console(stderr=True).print(
                f"{tool}: {row['gib']:.1f} GiB in {row['seconds']:.1f} s, cp {row['cp_seconds']:.1f} s, convert_vs_cp "
                f"{row['convert_vs_cp']:.2f}, peak {row['peak_gib']:.2f} GiB"
            )
    if args.json:
        setting = {"layers": layers, "rounds": args.rounds, "dtype": "bfloat16", "shape": SHAPE}
        setting["logits check"] = args.checked
        write_results(args.json, __doc__, setting, rows)


if __name__ == "__main__":
    main()
