"""What a study of arms says: figures of run folders, judgements over paired seeds, tables and a picture.

An arm is a list of its runs, one for each seed, in the same order for all arms: a run's `start` and `end` are held-out
losses in nats before and after training, its `curve` has pairs of tokens and loss.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("agg")
import matplotlib.pyplot as plt

UNTOLD = "not distinguishable"
_ROUNDING = 1e-5  # of a loss in float32, in nats
Run = dict[str, Any]
Arms = dict[str, list[Run]]


def is_done(folder: Path, steps: int) -> bool:
    """Whether a run has done all its steps and was evaluated; one that was stopped before has a summary too."""
    if not (folder / "summary.json").is_file():
        return False
    summary = json.loads((folder / "summary.json").read_text())
    return summary["steps"] == steps and summary["heldout_loss"] is not None


def figures(folder: Path, start: float | None, flops: float, a_step: int) -> dict[str, Any]:
    """What a run folder says of an arm; bytes and devices of models with experts alone.

    Args:
        folder: of the run.
        start: loss before its first step, if it began with a trained model.
        flops: of a token.
        a_step: tokens of a step.
    """
    summary = json.loads((folder / "summary.json").read_text())
    steps = summary["steps"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    midway = {line["heldout"]["step"]: next(iter(line["heldout"]["loss"].values())) for line in lines}
    losses = ({} if start is None else {0: start}) | midway | {steps: summary["heldout_loss"]}
    found: dict[str, Any] = {
        "end": summary["heldout_loss"],
        "curve": [[step * a_step, loss] for step, loss in sorted(losses.items())],
        "steps": steps,
        "tokens": steps * a_step,
        "gflop": steps * a_step * flops * 1e-9,
        "tokens_per_second": summary["tokens_per_second"],
    }
    found |= {} if start is None else {"start": start}
    if "ledger" in summary:
        ledger = summary["ledger"]
        found |= {"bytes": ledger["bytes_per_token"]["total"], "devices": ledger["devices_per_token"]}
        found |= {"load": summary["load_max_over_mean"], "changed": summary["changed_share"]}
    return found


def rivals_of(ways: list[str]) -> dict[str, list[str]]:
    """Beside which dense runs a construction is judged; the dense ones are shown too."""
    dense, flops = "dense, tokens", "dense, FLOPs of {}"
    found: dict[str, list[str]] = {dense: [], flops.format("split"): [], flops.format("upcycled"): []}
    for name in ways:
        equal = flops.format("upcycled" if name == "upcycled" else "split")
        found[name] = [dense] if name == "upcycled-halves" else [dense, equal]  # of halves FLOPs are as of the dense
    return found


def judge(one: list[float], other: list[float]) -> dict[str, Any]:
    """Whether the losses of one arm differ from those of another, seed by seed.

    They do if all seeds say so: if 0, to within what float32 rounds, lies outside of the spread, least to largest, of
    the differences of pairs. Of N seeds without any difference 2 in 2^N would still look like one, so a single seed
    tells nothing.

    Args:
        one, other: losses, those of the same seed at the same place.

    Returns:
        `mean` of one minus other, its `least` and `largest` seed, and whether they are `distinguishable`.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    least, largest = min(differences), max(differences)
    told = len(differences) > 1 and (least > _ROUNDING or largest < -_ROUNDING)
    return {"mean": statistics.fmean(differences), "least": least, "largest": largest, "distinguishable": told}


def in_words(found: dict[str, Any]) -> str:
    """A judgement for a table."""
    return f"{found['mean']:+.4f}" if found["distinguishable"] else UNTOLD


def losses(arms: Arms, name: str, key: str) -> list[float]:
    """`start` or `end` of every seed of an arm."""
    return [run[key] for run in arms[name]]


def best(arms: Arms, names: list[str], key: str) -> dict[str, Any]:
    """Which of the named arms has the lowest mean, and from which of the others it cannot be told."""
    first = min(names, key=lambda name: statistics.fmean(losses(arms, name, key)))
    others = [name for name in names if name != first]
    beside = {name: judge(losses(arms, name, key), losses(arms, first, key)) for name in others}
    return {"best": first, UNTOLD: [name for name, found in beside.items() if not found["distinguishable"]]}


def against(arms: Arms, rivals: dict[str, list[str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The ends of arms judged beside those of their rivals."""
    return {
        name: {rival: judge(losses(arms, name, "end"), losses(arms, rival, "end")) for rival in beside}
        for name, beside in rivals.items()
    }


def over_seeds(runs: list[Run]) -> dict[str, Any]:
    """Of every number of the runs its mean, least and largest; of numbers that a dense model lacks, nothing."""
    numbers = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    columns = {key: [run[key] for run in runs] for key in numbers}
    return {
        key: {"mean": statistics.fmean(column), "least": min(column), "largest": max(column)}
        for key, column in columns.items()
    }


def sentence(what: str, found: dict[str, Any]) -> str:
    """Who is best, and who may be as good."""
    beside = f"; {UNTOLD} from it: {', '.join(found[UNTOLD])}" if found[UNTOLD] else ""
    return f"{what} best: {found['best']}{beside}"


def show(title: str, arms: Arms, rivals: dict[str, list[str]], console: Console) -> None:
    """The table of some arms: means over seeds, losses with their spread, and what is told beside the rivals."""
    columns = ("start", "end (least, largest)", "GFLOP", "bytes", "devices", "load", "changed", "end beside others")
    table = Table("", *columns, title=title)
    judged = against(arms, rivals)
    for name in rivals:
        means = over_seeds(arms[name])
        end, rest = means["end"], []
        for key, form in (("bytes", ".0f"), ("devices", ".3f"), ("load", ".2f"), ("changed", ".1%")):
            rest.append(format(means[key]["mean"], form) if key in means else "")
        beside = "\n".join(f"{rival}: {in_words(found)}" for rival, found in judged[name].items())
        spread = f"{end['mean']:.4f} ({end['least']:.4f}, {end['largest']:.4f})"
        table.add_row(name, f"{means['start']['mean']:.4f}", spread, f"{means['gflop']['mean']:.3g}", *rest, beside)
    console.print(table)


def draw(path: Path, panels: dict[str, Arms]) -> None:
    """Held-out loss over tokens, a panel for each group of arms: the mean of seeds, and a band of their spread."""
    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 5), squeeze=False)
    for axis, (title, arms) in zip(axes[0], panels.items(), strict=True):
        for name, runs in arms.items():
            tokens = [point[0] for point in runs[0]["curve"]]
            columns = list(zip(*([point[1] for point in run["curve"]] for run in runs), strict=True))
            (line,) = axis.plot(tokens, [statistics.fmean(column) for column in columns], marker=".", label=name)
            axis.fill_between(
                tokens, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.2
            )
        axis.set(title=title, xlabel="tokens", ylabel="held-out loss, nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
