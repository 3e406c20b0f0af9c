"""The command line: `python -m checkpoint_tools condense weights | experts | layers | apply | merge`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ep_engine.command_line import print_json
from ep_engine.command_options import Corpus, Json, Overwrite, Resume, Timeout
from ep_engine.errors import UserError
from ep_engine.output import check_output_file, check_output_folder

condense_app = typer.Typer(help="Turn layers with experts into small dense ones (CD-MoE), step by step.")

Folder = Annotated[Path, typer.Argument(help="Hugging Face folder or engine checkpoint with experts")]
OutFile = Annotated[Path, typer.Option(help="file to write")]
MaxTexts = Annotated[int | None, typer.Option(min=1, help="documents of the corpus that are read [all]")]
MaxLength = Annotated[int, typer.Option(min=1, help="tokens of a text, longer ones are cut")]
WeightsFile = Annotated[Path, typer.Option(help="as `condense weights` writes it")]
ObjectiveOption = Annotated[
    Literal["js", "kl", "mse", "cosine"], typer.Option(help="how far hidden states are from the original ones")
]
InsteadOption = Annotated[
    Literal["condensed", "layer-drop", "block-drop"],
    typer.Option(help="what becomes of a layer; to compare with: no FFN, or no layer at all"),
]


@condense_app.command("weights")
def weights_command(
    source: Folder,
    corpus: Corpus,
    out: OutFile,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of a text, longer ones are cut [as many as the model has positions]"),
    ] = None,
    max_texts: MaxTexts = None,
    timeout_s: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The mean weight of every expert over the tokens that choose it, in one pass; under torchrun as the others."""
    from checkpoint_tools.condense.weights import run_weights

    check_output_file(out, overwrite=overwrite)
    result = run_weights(source, corpus, out, max_length=max_length, max_texts=max_texts, timeout_s=timeout_s)
    if result is None:  # another rank than the first
        return
    found, texts = result
    idle = int((found.count_LE == 0).sum())
    if as_json:
        print_json({"written": str(out), "texts": len(texts.ids), "tokens": texts.num_tokens, "cut": texts.num_cut,
                    "never_chosen": idle})  # fmt: skip
    else:
        typer.echo(
            f"wrote {out}: {len(found.count_LE)} layers, {texts.num_tokens} tokens of {len(texts.ids)} texts, of which "
            f"{texts.num_cut} were cut; {idle} experts were never chosen"
        )


@condense_app.command("experts")
def experts_command(
    source: Folder,
    corpus: Corpus,
    weights: WeightsFile,
    experts: Annotated[int, typer.Option(min=0, help="of a layer, beside its shared ones")],
    out: OutFile,
    choose: Annotated[
        Literal["search", "frequency", "mass", "weight"],
        typer.Option(help="one by one by the objective; or, to compare with, by what --weights says alone"),
    ] = "search",
    fit: Annotated[
        Path | None,
        typer.Option(help="file to write: --weights, those of the chosen by least squares, for this number"),
    ] = None,
    objective: ObjectiveOption = "js",
    max_length: MaxLength = 256,
    max_texts: MaxTexts = None,
    timeout_s: Timeout = 300.0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Which experts of each layer to keep, the most useful first; under torchrun on as many ranks as it starts."""
    from checkpoint_tools.condense.experts import ExpertOptions, ranked_experts, run_experts
    from checkpoint_tools.condense.published_json import Shape, read_weights, write_json
    from checkpoint_tools.source import open_source

    check_output_file(out, overwrite=overwrite)
    shape = Shape.of(open_source(source).config)
    if experts > shape.fewest:
        raise UserError(f"--experts ({experts}) must be in 0..{shape.fewest}, the experts of a layer; choose fewer")
    if fit is not None and choose != "search":
        raise UserError(f"--fit has no effect on --choose {choose}, which runs no text; leave one of them out")
    if fit is not None:
        check_output_file(fit, overwrite=overwrite)
    if choose != "search":
        lists = ranked_experts(read_weights(weights, shape), choose, experts)
        write_json(out, {str(layer): row for layer, row in enumerate(lists)})
        found: dict[str, Any] = {"written": str(out), "layers": [{"experts": row} for row in lists]}
    else:
        options = ExpertOptions(experts, objective, max_length, max_texts, timeout_s, fit)
        result = run_experts(source, corpus, weights, out, options, resume=resume)
        if result is None:  # another rank than the first
            return
        choices, texts = result
        layers = [asdict(choices[layer]) for layer in sorted(choices)]
        found = {"written": str(out), "layers": layers, "tokens": texts.num_tokens, "cut": texts.num_cut}
    if as_json:
        print_json(found)
    else:
        typer.echo(f"wrote {out}: {experts} experts of each of {shape.layers} layers")


@condense_app.command("layers")
def layers_command(
    source: Folder,
    corpus: Corpus,
    layers: Annotated[int, typer.Option(min=1, help="to condense, at most; fewer are the first of them")],
    out: OutFile,
    experts: Annotated[int, typer.Option(min=0, help="of a condensed layer, beside its shared ones")] = 0,
    weights: Annotated[Path | None, typer.Option(help="as `condense weights` writes it")] = None,
    lists: Annotated[Path | None, typer.Option(help="as `condense experts` writes it")] = None,
    instead: InsteadOption = "condensed",
    beam: Annotated[int, typer.Option(min=1, help="orders that are kept from step to step")] = 1,
    objective: ObjectiveOption = "js",
    max_length: MaxLength = 256,
    max_texts: MaxTexts = None,
    timeout_s: Timeout = 300.0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Which layers to condense first, by the model's final hidden states; under torchrun too."""
    from checkpoint_tools.condense.layers import LayerOptions, run_layers

    check_output_file(out, overwrite=overwrite)
    options = LayerOptions(layers, experts, beam, instead, objective, max_length, max_texts, timeout_s)
    result = run_layers(source, corpus, (weights, lists), out, options, resume=resume)
    if result is None:  # another rank than the first
        return
    order, distances = result
    if as_json:
        print_json({"written": str(out), "layers": order, "distances": distances})
    else:
        typer.echo(f"wrote {out}: layers {', '.join(map(str, order))} of those with experts")


@condense_app.command("apply")
def apply_command(
    source: Folder,
    out: Annotated[Path, typer.Argument(help="engine checkpoint to write; `export` makes a folder of it")],
    layers: Annotated[int, typer.Option(help="to condense, the first of --order")],
    experts: Annotated[int, typer.Option(help="of a condensed layer, beside its shared ones")] = 0,
    order: Annotated[Path | None, typer.Option(help="as `condense layers` writes it")] = None,
    weights: Annotated[Path | None, typer.Option(help="as `condense weights` writes it")] = None,
    lists: Annotated[Path | None, typer.Option(help="as `condense experts` writes it")] = None,
    instead: InsteadOption = "condensed",
    keep_scales: Annotated[
        bool, typer.Option("--keep-scales", help="weights of experts stay apart from the last matrix, to fine-tune")
    ] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write nothing; say how large it would be, from the configuration alone")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the smaller model: condensed layers are dense, the rest is as it was."""
    from checkpoint_tools.condense.apply import ApplyOptions, prepare
    from checkpoint_tools.condense.sizes import sizes_of
    from checkpoint_tools.conversion import How

    check_output_folder(out, overwrite=overwrite)
    options = ApplyOptions(layers, experts, instead, keep_scales)
    need, told = sizes_of(source, options, order), dict[str, Any]()
    if not dry_run:
        if order is None:
            raise UserError("--order is missing, the file that says which layers are condensed first; give it")
        gap = prepare(source, out, options, order, (weights, lists)).run(How(overwrite, resume))
        assert gap is not None, "it was asked for"
        told = {"written": str(out), "logit_gap": gap.max_abs_diff}
    if as_json:
        print_json(need.to_json() | told)
    else:
        typer.echo(
            f"{out} {'would have' if dry_run else 'has'} {need.parameters:,} parameters, {need.memory_ratio:.1%} of "
            f"{need.parameters_before:,}, {need.bytes / 2**30:.2f} GiB"
        )


@condense_app.command("merge")
def merge_command(
    source: Folder,
    out: Annotated[Path, typer.Argument(help="engine checkpoint to write; `export` makes a folder of it")],
    corpus: Corpus,
    experts: Annotated[int, typer.Option(min=1, help="that a layer is left with")],
    layers: Annotated[int | None, typer.Option(help="to merge, the first of --order [all]")] = None,
    order: Annotated[Path | None, typer.Option(help="as `condense layers` writes it")] = None,
    max_length: MaxLength = 256,
    max_texts: MaxTexts = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """To compare with: fewer experts in a layer, each the mean of some that are alike (M-SMoE)."""
    from checkpoint_tools.condense.apply import count_parameters
    from checkpoint_tools.condense.merge import MergeOptions, prepare
    from checkpoint_tools.conversion import How

    check_output_folder(out, overwrite=overwrite)
    options = MergeOptions(experts, layers, max_length, max_texts)
    conversion, texts = prepare(source, out, corpus, options, order)
    gap = conversion.run(How(overwrite, resume))
    assert gap is not None, "it was asked for"
    before, after = count_parameters(conversion.source.config), count_parameters(conversion.config)
    if as_json:
        print_json({"written": str(out), "parameters": after, "parameters_before": before, "logit_gap":
                    gap.max_abs_diff, "groups": conversion.options["groups"], "tokens": texts.num_tokens,
                    "cut": texts.num_cut})  # fmt: skip
    else:
        typer.echo(f"{out} has {after:,} parameters, {after / before:.1%} of {before:,}")
