"""Quickstart: the whole way on one machine, each step the command that a user would type.

text -> dense model -> experts -> trained on two ranks -> profile -> place -> four ways to route -> report, export
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ep_engine.c2r.collaboration import Profile
from ep_engine.c2r.place import place
from ep_engine.c2r.profile import profile
from ep_engine.checkpoint import newest
from ep_engine.config import RunConfig, make_config, to_toml
from ep_engine.data.corpus import encode_files, read_source, split_by_file, standard_library_files, train_tokenizer
from ep_engine.data.tokens import TokenFile, unigram_entropy
from ep_engine.errors import Fault
from ep_engine.machine import describe_machine
from ep_engine.mesh import World
from ep_engine.output import check_output_folder, whole_file
from ep_engine.placement import Placement
from ep_engine.progress import bar
from ep_engine.reports.report import BYTE_COLUMNS, CAPTION, COLUMNS, byte_rows, table_rows, write_report
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train

NUM_RANKS = 2
TOP_T = 3


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults take about five minutes on two cores."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    sequence_length: int = 128
    batch_size: int = 16
    dense_steps: int = 400
    expert_steps: int = 80
    arm_steps: int = 80
    heldout_batches: int = 16
    profile_tokens: int = 65_536
    num_experts: int = 8
    top_k: int = 2
    corpus_files: int | None = None  # None: all


@dataclass
class Progress:
    """Says what is done; measures time and the memory of this process and those it started."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    started: float = field(default_factory=time.perf_counter)
    peak_bytes: int = 0

    def done(self, sentence: str) -> None:
        """One line for a finished step."""
        self.console.print(
            f"[dim]{time.perf_counter() - self.started:5.0f} s[/dim]  {sentence}", highlight=False, soft_wrap=True
        )

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Sample resident memory four times a second."""
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.25):
                processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(_resident(process) for process in processes))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it ended meanwhile
        return 0


def quickstart(out: Path, sizes: Sizes | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Run everything into the folder `out` and return what stands in its summary.json.

    Raises:
        UserError: `out` is a file, or a folder that is not empty and `overwrite` is not set.
        Fault: a step failed; its log is in the folder.
    """
    sizes = sizes or Sizes()
    check_output_folder(out, overwrite=overwrite)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    progress = Progress()
    with progress.watching_memory():
        entropy = make_text(out, sizes, progress)
        dense = make_dense(out, sizes, entropy, progress)
        base = make_experts(out, sizes, progress)
        counted, placement = find_placement(out, base, sizes, progress)
        arms, metrics = run_arms(out, base, sizes, progress)
        generated = export_c2r(out, progress)
    summary = {
        "dense": {"heldout_loss": dense["heldout_loss"], "unigram_entropy": entropy},
        "arms": arms,
        "generated": generated,
        "ranks": NUM_RANKS,
        "machine": f"{describe_machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - progress.started,
        "peak_gib": progress.peak_bytes / 2**30,
    }
    contiguous = Placement.contiguous(sizes.num_experts, NUM_RANKS, sizes.num_layers)
    write_report(out / "report.html", summary, counted, placement, contiguous, metrics)
    with whole_file(out / "summary.json") as beside:
        beside.write_text(json.dumps(summary, indent=1) + "\n")
    progress.done(f"report in {out / 'report.html'}, figures in {out / 'summary.json'}")
    return summary


def make_text(out: Path, sizes: Sizes, progress: Progress) -> float:
    """The standard library of this Python as token files; returns the unigram entropy of the held-out part."""
    train_files, heldout_files = split_by_file(standard_library_files(), 0.1, seed=0)
    train_files, heldout_files = train_files[: sizes.corpus_files], heldout_files[: sizes.corpus_files]
    text = out / "text"
    with bar("training the tokenizer", len(train_files)) as advance:
        sources = (source for path in train_files if (source := read_source(path)) is not None)
        train_tokenizer(sources, sizes.vocab_size, text / "tokenizer", advance)
    counts = {}
    for name, files in (("train", train_files), ("heldout", heldout_files)):
        with bar(f"tokenising {name}", len(files)) as advance:
            counts[name] = encode_files(files, text / "tokenizer", text / name, advance).num_tokens
    entropy = unigram_entropy(TokenFile(text / "heldout"), sizes.vocab_size)
    progress.done(
        f"text: {counts['train']:,} tokens to train on, {counts['heldout']:,} held out, "
        f"unigram entropy {entropy:.4f} nats"
    )
    return entropy


def make_dense(out: Path, sizes: Sizes, entropy: float, progress: Progress) -> dict[str, Any]:
    """Train a dense model in this process and export it; returns the run's summary."""
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    config = _config(
        out,
        "dense",
        sizes,
        model={name: getattr(sizes, name) for name in names},
        train={"steps": sizes.dense_steps, "learning_rate": 2e-3, "min_learning_rate": 2e-4},
        data={"tokenizer": str(out / "text" / "tokenizer")},
    )
    with bar("training the dense model", sizes.dense_steps) as advance:
        summary = train(resolve(config, 1, overwrite=True), World(), lambda line: advance(line["step"]))
    loss = summary["heldout_loss"]
    progress.done(f"dense: held-out loss {loss:.4f} nats, {entropy - loss:.4f} below the unigram entropy")
    run_tool("export", _last(out / "dense"), out / "dense-hf", "--overwrite")
    gap = run_tool("verify", _last(out / "dense"), out / "dense-hf")
    progress.done(f"dense: loads in transformers, logits equal within {gap['max_abs_diff']:.1e}")
    return summary


def make_experts(out: Path, sizes: Sizes, progress: Progress) -> Path:
    """Split the dense model, check it, train it on two ranks with plain top-k; returns the checkpoint."""
    dense, experts = _last(out / "dense"), out / "experts"
    counts = ("--num-experts", sizes.num_experts, "--top-k", sizes.top_k)
    run_tool("split", dense, experts, *counts, "--overwrite")
    gap = run_tool("verify", dense, experts, "--all-experts")
    progress.done(
        f"split: {sizes.num_experts} experts, top-{sizes.top_k}; all experts on = dense within "
        f"{gap['max_abs_diff']:.1e}"
    )
    summary = _torchrun(
        _config(
            out,
            "base",
            sizes,
            model={"checkpoint": str(experts)},
            train={"steps": sizes.expert_steps, "learning_rate": 1e-3, "seed": 1},
            parallel={"expert_parallel_size": NUM_RANKS},
            balance={"switch": 0.1},
        ),
        progress,
    )
    progress.done(f"experts: trained on {NUM_RANKS} ranks, held-out loss {summary['heldout_loss']:.4f}")
    return _last(out / "base")


def find_placement(out: Path, base: Path, sizes: Sizes, progress: Progress) -> tuple[Profile, Placement]:
    """Count who works with whom on training text, and place."""
    with bar("profiling", sizes.profile_tokens) as advance:
        counted = profile(
            base,
            TokenFile(out / "text" / "train", vocab_size=sizes.vocab_size),
            max_tokens=sizes.profile_tokens,
            sequence_length=sizes.sequence_length,
            advance=advance,
        ).profile
    counted.save(out / "profile.npz")
    placement, found = place(counted, NUM_RANKS)
    placement.save(out / "placement.json", measured=found)
    progress.done(
        f"placement: {found['placed']['intra_device_fraction']:.1%} of co-activated pairs on one device, "
        f"{found['contiguous']['intra_device_fraction']:.1%} by id"
    )
    return counted, placement


def run_arms(
    out: Path, base: Path, sizes: Sizes, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Four ways to route, from one checkpoint, with the same steps on the same data."""
    placed = {"placement": str(out / "placement.json")}
    lists = {"profile": str(out / "profile.npz"), "top_t": TOP_T}
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "plain": {"moe": {"combine": "per_expert"}},
        "placed": {"moe": placed},
        "c2r": {"moe": placed, "routing": {"rule": "c2r", **lists}},
        "c2r_grouped": {"moe": placed, "routing": {"rule": "c2r_grouped", "max_devices": 1, **lists}},
    }
    arms, metrics = {}, {}
    for name, sections in ways.items():
        config = _config(
            out,
            name,
            sizes,
            model={"checkpoint": str(base)},
            train={"steps": sizes.arm_steps, "learning_rate": 5e-4, "seed": 2},
            parallel={"expert_parallel_size": NUM_RANKS},
            balance={"switch": 0.1},
            **sections,
        )
        arms[name] = _figures(_torchrun(config, progress))
        metrics[name] = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        progress.done(
            f"{name}: held-out loss {arms[name]['heldout_loss']:.4f}, {arms[name]['bytes_per_token']:.0f} bytes per "
            f"token, {arms[name]['changed_share']:.1%} of selections changed"
        )
    return arms, metrics


def export_c2r(out: Path, progress: Progress) -> str:
    """Export the C2R arm, compare its logits with the engine's, and let transformers generate; returns the text."""
    checkpoint, folder = _last(out / "c2r"), out / "c2r-hf"
    run_tool("export", checkpoint, folder, "--overwrite")
    gap = run_tool("verify", checkpoint, folder)
    progress.done(f"export: {folder} loads in transformers, logits equal within {gap['max_abs_diff']:.1e}")
    text = generate(folder, "def __init__(self")
    progress.done(f"generated: {text!r}")
    return text


def generate(folder: Path, prompt: str, new_tokens: int = 24) -> str:
    """Greedy continuation by transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer(prompt, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    output = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def print_table(summary: dict[str, Any], console: Console) -> None:
    """The closing table, and where the bytes go."""
    arms = summary["arms"]
    for columns, rows, caption in ((COLUMNS, table_rows(arms), CAPTION), (BYTE_COLUMNS, byte_rows(arms), None)):
        table = Table(*columns, box=SIMPLE, caption=caption, caption_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    """What an arm's summary says that the table shows."""
    ledger = run["ledger"]
    by_direction = dict(ledger["bytes_per_token"])
    return {
        "device": run["device"],
        "heldout_loss": run["heldout_loss"],
        "bytes_per_token": by_direction.pop("total"),
        "devices_per_token": ledger["devices_per_token"],
        "load_max_over_mean": run["load_max_over_mean"],
        "tokens_per_second": run["tokens_per_second"],
        "changed_share": run["changed_share"],
        "device_load_max_over_mean": run["device_load_max_over_mean"],
        "tokens_per_second_spread": run["tokens_per_second_spread"],
        "remote_rows_per_token": ledger["remote_rows_per_token"],
        "bytes_by_direction": by_direction,
        "bytes_by_layer": [
            sum(tiers[t] for tiers in layer["bytes"].values() for t in ("node", "network")) / layer["tokens"]
            for layer in ledger["layers"]
        ],
    }


def _config(out: Path, name: str, sizes: Sizes, **sections: dict[str, Any]) -> RunConfig:
    text = out / "text"
    data = {
        "train": str(text / "train"),
        "heldout": str(text / "heldout"),
        "sequence_length": sizes.sequence_length,
        "batch_size": sizes.batch_size,
        "heldout_batches": sizes.heldout_batches,
    }
    raw = {**sections, "data": {**data, **sections.get("data", {})}, "output": {"folder": str(out / name)}}
    return make_config(raw, f"quickstart's run {name}")


def _torchrun(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Train on `NUM_RANKS` ranks of this machine; returns the run's summary."""
    resolve(config, NUM_RANKS, overwrite=True)
    folder = config.output.folder
    run_file, log = folder.with_suffix(".toml"), folder.with_suffix(".log")
    run_file.write_text(to_toml(config))
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    command += ["-m", "ep_engine.cli", "train", str(run_file), "--overwrite"]
    threads = max(1, (os.cpu_count() or 1) // NUM_RANKS)
    # All ranks are on this machine, whose own name need not resolve.
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    with (
        log.open("w") as file,
        bar(f"training {folder.name} on {NUM_RANKS} ranks", config.train.steps) as advance,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        while process.poll() is None:
            time.sleep(0.2)
            advance(_steps_done(folder / "metrics.jsonl"))
    if process.returncode != 0:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise Fault(f"training {folder.name} ended with status {process.returncode}; see {log} ({lines[-1][:120]})")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _steps_done(metrics: Path) -> int:
    try:
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):  # not there yet, or half a line
        return 0


def run_tool(command: str, *arguments: object) -> dict[str, Any]:
    """Run a command of `python -m checkpoint_tools`; returns its report, Fault if it fails."""
    line = [sys.executable, "-P", "-m", "checkpoint_tools", command, *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip()  # `verify` reports what is not the same
        raise Fault(f"checkpoint_tools {command} ended with status {done.returncode}: {words[-300:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _last(run_folder: Path) -> Path:
    """The last checkpoint of a run."""
    checkpoint = newest(run_folder)
    assert checkpoint is not None, "a run that ends well has written one"
    return checkpoint
