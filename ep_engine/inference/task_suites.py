"""Tasks of lm-eval: suites of published evaluations, names and their shots, and what came out."""

import os
import random
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ep_engine.errors import UserError

_LLAMA_MOE = {
    "sciq": 0, "piqa": 0, "winogrande": 0, "arc_easy": 0, "arc_challenge": 25, "hellaswag": 10, "logiqa": 0,
    "boolq": 32, "lambada_openai": 0, "mmlu": 5,
}  # fmt: skip
SUITES: dict[str, dict[str, int]] = {
    # arXiv:2504.01337 speaks of ten tasks, on LLaMA-MoE among others, and its code names none. These are the ten of
    # LLaMA-MoE's own evaluation that it did with lm-eval: a stand-in.
    "c2r": _LLAMA_MOE,
    # arXiv:2406.16554. Its Natural Questions were scored by OpenCompass; here by lm-eval.
    "llama-moe": {**_LLAMA_MOE, "nq_open": 32},
    # arXiv:2412.00069, its README.
    "cd-moe": dict.fromkeys(
        ("arc_challenge", "boolq", "piqa", "rte", "openbookqa", "winogrande", "mmlu", "hellaswag"), 0
    ),
}
"""Tasks by suite, and how many solved examples stand before each question."""
NOTES = {"c2r": "suite c2r: its paper's ten tasks could not be read; these are LLaMA-MoE's ten of lm-eval"}


def named_tasks(names: Sequence[str], num_fewshot: int | None) -> dict[str, int | None]:
    """The tasks that names and suites stand for, with their shots; None: as the task says.

    Raises:
        UserError: a task comes twice, or shots are given for a suite, which has its own.
    """
    asked: dict[str, int | None] = {}
    for name in names:
        if name in SUITES and num_fewshot is not None:
            raise UserError(
                f"--num-fewshot ({num_fewshot}) has no effect on suite {name}, whose shots are its own; name its tasks "
                f"instead: {','.join(SUITES[name])}"
            )
        for task, shots in SUITES.get(name, {name: num_fewshot}).items():
            if task in asked:
                raise UserError(f"--tasks names {task} twice ({', '.join(names)}); name it once")
            asked[task] = shots
    return asked


def load_tasks(asked: dict[str, int | None], include_path: Path | None) -> dict[str, dict[str, Any]]:
    """`tasks` and `groups` of lm-eval, by name, with their data, which may be downloaded.

    Args:
        asked: of `named_tasks`.
        include_path: folder of task files of one's own, looked into first.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, or a task's data cannot be had or needs more than text.
    """
    manager, found = task_manager(asked, include_path), {"tasks": dict[str, Any](), "groups": dict[str, Any]()}
    # The seeds of lm-eval's own command: some tasks shuffle their data.
    random.seed(0)
    np.random.seed(1234)
    for name, shots in asked.items():
        try:
            loaded = manager.load([name])
        except Exception as error:  # a download, a script of the task: anything
            words = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"task {name} cannot be loaded ({words}); without network give task files with --include-path"
            ) from None
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(f"task {name} runs generated code or shows pictures, which is not done; leave it out")
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
            task.set_fewshot_seed(seed=1234)
        found["tasks"] |= loaded["tasks"]
        found["groups"] |= loaded["groups"]
    return found


def task_manager(names: Iterable[str], include_path: Path | None) -> Any:
    """lm-eval's TaskManager, which knows all `names`; UserError as in `load_tasks`."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm_eval, which cannot be imported ({error}); pip install 'ep_engine[evaluate]'"
        ) from None
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path} is no folder; give one with task files (.yaml)")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in own.all_tasks for name in names):
            return own
    manager = _manager_of_all(include_path)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, [*SUITES, *manager.all_tasks], n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"suites are {', '.join(SUITES)}"
            raise UserError(f"task {name} is unknown to lm-eval; {hint}")
    return manager


@cache  # it reads thousands of files
def _manager_of_all(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_tasks(model: Any, tasks: dict[str, dict[str, Any]], limit: int | None) -> dict[str, Any]:
    """What lm-eval finds: by task or group its metrics, shots and number of questions.

    Args:
        model: of a class of lm-eval.
        tasks: of `load_tasks`.
        limit: questions of each task; None: all.
    """
    from lm_eval import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its processes would be forks of one with threads
    found = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
    assert found is not None, "every rank is the first to lm-eval"
    report = {}
    for name, metrics in found["results"].items():
        values = {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, (int, float))}
        counts = found["n-samples"].get(name, {})
        report[name] = {"shots": found["n-shot"].get(name), "questions": counts.get("effective"), **values}
    return report


def print_scores(report: dict[str, Any], console: Console) -> None:
    """Show what `ep-engine evaluate` found."""
    if report["tasks"]:
        table = Table("task", "shots", "metric", "value", "standard error")
        for name, found in report["tasks"].items():
            for metric, value in found.items():
                if metric not in ("shots", "questions", "sample_len") and "_stderr" not in metric:
                    plain, _, filtered = metric.partition(",")
                    error = found.get(f"{plain}_stderr" + (f",{filtered}" if filtered else ""))
                    shown = "" if error is None else f"{error:.4f}"
                    table.add_row(name, str(found["shots"]), metric, f"{value:.4f}", shown)
        console.print(table)
    if heldout := report["heldout"]:
        console.print(
            f"{heldout['file']}: loss {heldout['loss']:.4f} nats, perplexity {heldout['perplexity']:.4f}, "
            f"{heldout['tokens']} tokens in windows of {heldout['sequence_length']}"
        )
    for note in report["notes"]:
        console.print(note)
