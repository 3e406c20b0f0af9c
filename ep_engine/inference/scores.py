"""Scores: tasks of lm-eval and perplexity, of an engine checkpoint on its ranks or of a Hugging Face folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_engine.data.tokens import TokenFile
from ep_engine.data.vocabulary import check_text
from ep_engine.errors import UserError
from ep_engine.inference.generate import read_tokenizer
from ep_engine.inference.loaded_model import Rule, loaded, ruled
from ep_engine.inference.perplexity import num_windows, summary, window_losses
from ep_engine.inference.task_suites import run_tasks
from ep_engine.mesh import World
from ep_engine.progress import bar

Tasks = dict[str, dict[str, Any]]
"""Of `task_suites.load_tasks`; {}: none."""


@dataclass(frozen=True)
class Asked:
    """What to find out about a model.

    Attributes:
        tasks: loads tasks of lm-eval, or none; called once the model is known to be one.
        limit: questions of each; None: all.
        tokens: token file for perplexity; None: none.
        sequence_length: tokens of one of its windows.
        max_tokens: of it; None: all.
        batch_size: requests, or windows, of a rank at once.
    """

    tasks: Callable[[], Tasks]
    limit: int | None
    tokens: Path | None
    sequence_length: int
    max_tokens: int | None
    batch_size: int

    def text(self, model: Path, vocab_size: int, positions: int) -> tuple[TokenFile | None, int]:
        """The token file and the number of its windows; UserError if they are not for a model of these sizes."""
        if self.tokens is None:
            return None, 0
        text = TokenFile(self.tokens, vocab_size=vocab_size)
        count = num_windows(text, self.sequence_length, self.max_tokens, positions)
        check_text(text, model, vocab_size)
        return text, count


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is an engine checkpoint, and no Hugging Face folder."""
    return (folder / "model.json").is_file() or not (folder / "config.json").is_file()


def evaluate_checkpoint(folder: Path, asked: Asked, world: World, rule: Rule, timeout_s: float) -> dict[str, Any]:
    """Score an engine checkpoint; every rank calls this, and has all answers.

    Raises:
        UserError: something of what is asked cannot be; before any process group is made.
    """
    config = ruled(folder, rule)
    text, count = asked.text(folder, config.vocab_size, config.max_position_embeddings)
    tasks = asked.tasks()
    _check_any(tasks, text)
    tokenizer = read_tokenizer(folder) if tasks else None
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {folder} names no eos_token, which tasks begin and end texts with; add one")
    most, show = asked.batch_size * config.max_position_embeddings, world.rank == 0
    report: dict[str, Any] = {"rule": config.moe and config.moe.routing.rule, "tasks": {}, "heldout": None}
    with loaded(folder, world, rule, most_tokens=most, timeout_s=timeout_s) as model:
        if tasks:
            from ep_engine.inference.lm_eval_model import EngineLM

            report["tasks"] = run_tasks(EngineLM(model, tokenizer, asked.batch_size, show=show), tasks, asked.limit)
        if text is not None:
            length, found = asked.sequence_length, []
            with bar("scoring windows", count, show=show) as advance:
                for losses in model.share_out(
                    range(count),
                    asked.batch_size,
                    lambda own: window_losses(model.model, text, own, length, model.device),
                ):
                    found += losses
                    advance(len(found))
            report["heldout"] = {"file": str(asked.tokens), **summary(found, length)}
    return report


def evaluate_folder(folder: Path, asked: Asked, world: World, rule: Rule) -> dict[str, Any]:
    """Score a Hugging Face folder, whose code is run, in float32 on one rank.

    Raises:
        UserError: there are several ranks, or a rule is given.
    """
    if world.size > 1:
        raise UserError(f"{folder} is a Hugging Face folder, which {world.size} ranks do not share; convert it first")
    for option, value in (("rule", rule.rule), ("profile", rule.profile), ("placement", rule.placement)):
        if value is not None:
            raise UserError(
                f"--{option} {value} is for engine checkpoints, {folder} is a Hugging Face folder; convert it"
            )
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # code of the folder runs, which can raise anything
        words = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{folder} cannot be read by transformers ({words}); export or download it again") from None
    text, count = asked.text(folder, config.vocab_size, config.max_position_embeddings)
    tasks = asked.tasks()
    _check_any(tasks, text)
    hflm = _class_of_lm_eval() if tasks else None
    tokenizer = read_tokenizer(folder, run_its_code=True) if tasks else None  # else transformers asks on the terminal
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval().to(device)
    report: dict[str, Any] = {"rule": getattr(config, "routing_rule", None), "tasks": {}, "heldout": None}
    if hflm is not None:
        of_folder = hflm(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size)
        report["tasks"] = run_tasks(of_folder, tasks, asked.limit)
    if text is not None:

        def logits_of(ids_BS: Tensor) -> Tensor:
            logits: Tensor = model(ids_BS).logits
            return logits

        length, found = asked.sequence_length, []
        with bar("scoring windows", count) as advance:
            for start in range(0, count, asked.batch_size):
                own = range(start, min(start + asked.batch_size, count))
                found += window_losses(logits_of, text, own, length, device)
                advance(len(found))
        report["heldout"] = {"file": str(asked.tokens), **summary(found, length)}
    return report


def _class_of_lm_eval() -> Any:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"tasks on a Hugging Face folder need accelerate, which cannot be imported ({error}); "
            "pip install 'ep_engine[evaluate]'"
        ) from None
    return HFLM


def _check_any(tasks: Tasks, text: TokenFile | None) -> None:
    if not tasks and text is None:
        raise UserError("there is nothing to evaluate on; give --tasks, --tokens, or both")
