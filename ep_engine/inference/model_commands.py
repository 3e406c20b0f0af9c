"""The commands that ask a model: `ep-engine generate | evaluate`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ep_engine.command_line import print_json
from ep_engine.command_options import Json, Timeout

RuleOption = Annotated[str | None, typer.Option(help="topk, c2r:T, c2r_grouped:T:M, group_limited:GROUPS:M [its own]")]
ProfileOption = Annotated[Path | None, typer.Option(help="of the lists of C2R")]
PlacementOption = Annotated[Path | None, typer.Option(help="of the experts, and for the M of c2r_grouped")]


def generate_command(
    model: Annotated[Path, typer.Argument(help="engine checkpoint with a tokenizer")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; several may be given")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="a prompt a line, or .jsonl with `prompt`")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="unless the text ends before")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token; else sampling")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="of the likeliest tokens, to sample from")] = 1.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts of a rank at once")] = 16,
    rule: RuleOption = None,
    profile: ProfileOption = None,
    placement: PlacementOption = None,
    timeout_s: Timeout = 300.0,
    as_json: Json = False,
) -> None:
    """Continue texts; under torchrun on as many ranks as it starts."""
    from ep_engine.inference.generate import (
        Sampling,
        check_lengths,
        continue_all,
        encode,
        end_tokens,
        read_prompts,
        read_tokenizer,
    )
    from ep_engine.inference.loaded_model import Rule, loaded, ruled
    from ep_engine.mesh import World
    from ep_engine.progress import bar

    world, by = World.from_environment(), Rule(rule, profile, placement)
    texts, config = read_prompts(prompt or [], prompt_file), ruled(model, by)
    tokenizer = read_tokenizer(model)
    prompts = [encode(tokenizer, text, config) for text in texts]
    longest, last = check_lengths(prompts, max_new_tokens, config), end_tokens(config, tokenizer)
    with (
        loaded(model, world, by, most_tokens=batch_size * longest, timeout_s=timeout_s) as of_ranks,
        bar("generating", len(texts), show=world.rank == 0) as advance,
    ):
        found = continue_all(
            of_ranks,
            prompts,
            max_new_tokens,
            lambda tokens: tokens[-1] in last,
            Sampling(temperature, top_p, seed),
            batch_size=batch_size,
            advance=advance,
        )
    if world.rank > 0:
        return
    continued = [
        {"prompt": text, "text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}
        | {"ended": tokens[-1] in last}
        for text, tokens in zip(texts, found, strict=True)
    ]
    if as_json:
        print_json({"continued": continued})
        return
    for one in continued:
        typer.echo(f"{one['prompt']}{one['text']}")


def evaluate_command(
    model: Annotated[Path, typer.Argument(help="engine checkpoint, or Hugging Face folder, whose code is then run")],
    tasks: Annotated[list[str] | None, typer.Option(help="of lm-eval, or c2r, llama-moe, cd-moe; with commas")] = None,
    tokens: Annotated[Path | None, typer.Option(help="token file for perplexity, named without suffix")] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder of task files of your own")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="solved examples before a question [the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="questions of each task [all]")] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="of --tokens: tokens of a window")] = 128,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of --tokens, from the beginning [all]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="requests of a rank at once")] = 8,
    rule: RuleOption = None,
    profile: ProfileOption = None,
    placement: PlacementOption = None,
    timeout_s: Timeout = 300.0,
    as_json: Json = False,
) -> None:
    """Score a model on tasks and on held-out tokens; checkpoints under torchrun on as many ranks as it starts."""
    from rich.console import Console

    from ep_engine.inference.loaded_model import Rule
    from ep_engine.inference.scores import Asked, evaluate_checkpoint, evaluate_folder, is_checkpoint
    from ep_engine.inference.task_suites import NOTES, load_tasks, named_tasks, print_scores
    from ep_engine.mesh import World

    names = [name for words in tasks or [] for name in words.split(",") if name]
    asked = Asked(
        tasks=lambda: load_tasks(named_tasks(names, num_fewshot), include_path) if names else {},
        limit=limit,
        tokens=tokens,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    world, by = World.from_environment(), Rule(rule, profile, placement)
    with redirect_stdout(sys.stderr):  # stdout is for the report, and lm-eval prints
        if is_checkpoint(model):
            found = evaluate_checkpoint(model, asked, world, by, timeout_s)
        else:
            found = evaluate_folder(model, asked, world, by)
    report: dict[str, Any] = {"model": str(model), **found, "notes": [NOTES[name] for name in names if name in NOTES]}
    if world.rank > 0:
        return
    if as_json:
        print_json(report)
    else:
        print_scores(report, Console())
