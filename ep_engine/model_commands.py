"""The commands that ask a model: `ep-engine generate`."""

from pathlib import Path
from typing import Annotated

import typer

from ep_engine.command_line import print_json

RuleOption = Annotated[str | None, typer.Option(help="topk, c2r:T, c2r_grouped:T:M, group_limited:GROUPS:M [its own]")]
ProfileOption = Annotated[Path | None, typer.Option(help="of the lists of C2R")]
PlacementOption = Annotated[Path | None, typer.Option(help="of the experts, and for the M of c2r_grouped")]
TimeoutOption = Annotated[float, typer.Option(min=1, help="seconds after which a silent rank is given up")]


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
    timeout_s: TimeoutOption = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on stdout")] = False,
) -> None:
    """Continue texts; under torchrun on as many ranks as it starts."""
    from ep_engine.generate import (
        Sampling,
        check_lengths,
        continue_all,
        encode,
        end_tokens,
        read_prompts,
        read_tokenizer,
    )
    from ep_engine.loaded_model import Rule, loaded, ruled
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
