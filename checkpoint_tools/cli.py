"""The command line: `python -m checkpoint_tools inspect | convert | export | cluster | importance | split | ...`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from checkpoint_tools.condense.cli import condense_app
from checkpoint_tools.conversion import Conversion, How
from ep_engine.command_line import print_json
from ep_engine.command_options import Corpus, Json, Overwrite, Resume, Timeout
from ep_engine.errors import UserError
from ep_engine.output import check_output_file, check_output_folder

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(condense_app, name="condense")

Folder = Annotated[Path, typer.Argument(help="Hugging Face folder or engine checkpoint")]
Out = Annotated[Path, typer.Argument(help="folder to write")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="write nothing; say what it would need")]
Check = Annotated[
    bool, typer.Option("--check-logits/--no-check-logits", help="run source and output, which costs a second reading")
]
Method = Literal["random", "clustering", "coactivation", "gradient", "published"]
Kernel = Literal["plain", "l1_norm", "l2_norm"]
Metric = Literal["l2", "cos"]
Projection = Literal["up_proj", "gate_proj"]
Assignment = Literal["optimal", "greedy", "shared"]


@app.command("inspect")
def inspect_command(folder: Folder, as_json: Json = False) -> None:
    """Show what a model folder holds; --json adds shape, dtype and checksum of every entry."""
    from checkpoint_tools.inspect import inspect

    found = inspect(folder)
    if as_json:
        print_json(found.to_json())
        return
    moe = found.config.moe
    experts = f"{moe.num_experts} experts, top-{moe.top_k}, {moe.routing.rule}" if moe else "dense"
    typer.echo(f"{found.folder}: {found.kind}, {found.architecture}, {found.config.num_layers} layers, {experts}")
    typer.echo(
        f"{len(found.entries)} entries, {found.num_parameters:,} parameters, {found.num_active_parameters:,} active, "
        f"{found.num_bytes / 2**30:.2f} GiB"
    )


@app.command("convert")
def convert_command(
    source: Folder,
    out: Out,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    check_logits: Check = True,
    as_json: Json = False,
) -> None:
    """Turn a Hugging Face folder into an engine checkpoint."""
    from checkpoint_tools import convert

    check_output_folder(out, overwrite=overwrite)
    _run(convert.prepare(source, out), How(overwrite, resume, check_logits), dry_run, as_json)


@app.command("export")
def export_command(
    source: Folder,
    out: Out,
    family: Annotated[str | None, typer.Option(help="to which family [the one it came from]")] = None,
    c2r: Annotated[
        bool, typer.Option("--c2r", help="with our modeling file, as condensed layers always are: it runs all rules")
    ] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    check_logits: Check = True,
    as_json: Json = False,
) -> None:
    """Turn an engine checkpoint into a Hugging Face folder."""
    from checkpoint_tools import export

    check_output_folder(out, overwrite=overwrite)
    _run(
        export.prepare(source, out, family=family, our_code=c2r), How(overwrite, resume, check_logits), dry_run, as_json
    )


@app.command("split")
def split_command(
    source: Folder,
    out: Out,
    num_experts: Annotated[int, typer.Option(help="experts per layer; must divide the FFN width")],
    top_k: Annotated[int, typer.Option(help="experts per token")],
    method: Annotated[Method, typer.Option(help="how neurons are given to experts")] = "random",
    metric: Annotated[Metric, typer.Option(help="of clustering: distance of rows, or of their directions")] = "l2",
    on: Annotated[Projection, typer.Option(help="whose rows are clustered, or whose importance is read")] = "up_proj",
    files: Annotated[Path | None, typer.Option(help="of published: a folder of split files")] = None,
    importance: Annotated[Path | None, typer.Option(help="of gradient: a folder of scores for every expert")] = None,
    assignment: Annotated[Assignment, typer.Option(help="of gradient: best sum; published; best of each")] = "optimal",
    expert_size: Annotated[
        int | None, typer.Option(min=1, help="of --assignment shared: neurons of an expert [an equal share]")
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="of coactivation: .jsonl and .txt files, or folders of them")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of coactivation: of the corpus")] = 16384,
    sequence_length: Annotated[int, typer.Option(min=1, help="of coactivation: tokens of a row")] = 512,
    kernel: Annotated[Kernel, typer.Option(help="of coactivation: what a feature counts")] = "l1_norm",
    threshold: Annotated[
        float, typer.Option(min=0, help="of coactivation: most that a pair counts in 4096 tokens")
    ] = 1.0,
    reference_compat: Annotated[
        bool,
        typer.Option(
            "--reference-compat",
            help="of clustering and gradient: as the published code, l2 whatever --metric says, clusters in text order",
        ),
    ] = False,
    residual_experts: Annotated[
        int, typer.Option(min=0, help="of gradient and published: experts that every token goes through")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of the shuffles and of the router's weights")] = 0,
    gate: Annotated[str, typer.Option(help="router: mlp or linear")] = "mlp",
    gate_init: Annotated[
        Literal["random", "neurons"], typer.Option(help="router's weights, or the mean direction of an expert's rows")
    ] = "random",
    gate_noise: Annotated[
        bool, typer.Option("--gate-noise", help="give the router a noise matrix, for balance.noise of a run")
    ] = False,
    score: Annotated[
        Literal["softmax_of_chosen", "sigmoid"],
        typer.Option(help="combine weights: softmax over the chosen; their sigmoids over the sum"),
    ] = "softmax_of_chosen",
    score_scale: Annotated[
        str | None, typer.Option(help="factor on the combine weights, or 4,2.5,... of every layer [experts / top-k]")
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    check_logits: Check = True,
    as_json: Json = False,
) -> None:
    """Split the FFNs of a dense model into experts; all experts together are the dense model, which is checked."""
    from checkpoint_tools import split
    from checkpoint_tools.partition import PartitionOptions

    texts = (tuple(corpus or ()), max_tokens, sequence_length, kernel, threshold, reference_compat)
    partition = PartitionOptions(method, metric, on, files, importance, assignment, expert_size, *texts)
    partition.check()
    if method == "coactivation" and dry_run:
        raise UserError("--dry-run cannot foretell --method coactivation, which first reads the text; leave one out")
    check_output_folder(out, overwrite=overwrite)
    options = split.SplitOptions(
        num_experts,
        top_k,
        seed,
        gate,
        split.parse_scales(score_scale),
        partition,
        residual_experts,
        gate_init,
        score,
        gate_noise,
    )
    _run(split.prepare(source, out, options), How(overwrite, resume, check_logits), dry_run, as_json)


@app.command("cluster")
def cluster_command(
    corpus: Annotated[list[Path], typer.Argument(help=".jsonl and .txt files, or folders of them")],
    out: Annotated[Path, typer.Option(help="folder to write, a .jsonl for each cluster")],
    clusters: Annotated[int, typer.Option(min=1, help="as many as experts")],
    embed: Annotated[
        Path | None, typer.Option(help="folder of a sentence-transformers model [TF-IDF, which needs none]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of k-means")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Cluster the documents of a corpus, for `importance`."""
    from checkpoint_tools.cluster import cluster

    check_output_folder(out, overwrite=overwrite)
    sizes = cluster(corpus, out, clusters, embed=embed, seed=seed, overwrite=overwrite)
    if as_json:
        print_json({"written": str(out), "documents": sizes})
    else:
        typer.echo(f"wrote {out}: {len(sizes)} clusters of {min(sizes)} to {max(sizes)} documents")


@app.command("importance")
def importance_command(
    source: Folder,
    out: Annotated[Path, typer.Argument(help="folder to write, a folder for each cluster")],
    clusters: Annotated[Path, typer.Option(help="folder of .jsonl files, as `cluster` writes it")],
    kernel: Annotated[Kernel, typer.Option(help="of what a token gives: itself, absolute, squared")] = "l1_norm",
    level: Annotated[
        Literal["sample", "total"], typer.Option(help="kernel of every token, or of the sum over all")
    ] = "sample",
    kind: Annotated[
        Literal["change", "grad"], typer.Option(help="feature times its gradient, or the gradient alone")
    ] = "change",
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens of a row")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="of a cluster")] = 131072,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of computation")] = "float32",
    timeout_s: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """How much each cluster needs each neuron, by gradients; under torchrun on as many ranks as it starts."""
    from checkpoint_tools.gradient import GradientOptions, run_importance

    check_output_folder(out, overwrite=overwrite)
    options = GradientOptions(kernel, level, kind, sequence_length, max_tokens, dtype)
    tokens = run_importance(source, clusters, out, options, timeout_s=timeout_s, overwrite=overwrite)
    if tokens is None:  # another rank than the first
        return
    if as_json:
        print_json({"written": str(out), "tokens": tokens})
    else:
        typer.echo(f"wrote {out}: {len(tokens)} clusters of {min(tokens.values())} to {max(tokens.values())} tokens")


@app.command("upcycle")
def upcycle_command(
    source: Folder,
    out: Out,
    top_k: Annotated[int, typer.Option(min=1, help="experts per token")],
    num_experts: Annotated[int | None, typer.Option(min=1, help="experts per layer")] = None,
    experts_per_layer: Annotated[
        str | None, typer.Option(help="of every layer instead, such as 0,4,4,8; 0: the FFN stays")
    ] = None,
    granularity: Annotated[int, typer.Option(min=1, help="slices that an FFN is cut into before it is copied")] = 1,
    start_layer: Annotated[int, typer.Option(min=0, help="first layer with experts")] = 0,
    layer_step: Annotated[int, typer.Option(min=1, help="from one layer with experts to the next")] = 1,
    gate: Annotated[
        Literal["linear", "mlp", "mlp_gelu", "cosine"],
        typer.Option(help="router; mlp_gelu and cosine are the mlp and gmm of MoLlama"),
    ] = "linear",
    gate_hidden_size: Annotated[int, typer.Option(min=0, help="inside of gates mlp_gelu and cosine [256]")] = 0,
    gate_init: Annotated[Literal["random", "zero"], typer.Option(help="weights of the router")] = "random",
    score: Annotated[
        Literal["softmax_of_chosen", "softmax", "sigmoid"],
        typer.Option(help="combine weights: softmax over the chosen or all experts; sigmoids over their sum"),
    ] = "softmax_of_chosen",
    scale: Annotated[
        Literal["none", "w_down", "cube-root"], typer.Option(help="of --score softmax: what makes up for its small sum")
    ] = "w_down",
    noise: Annotated[float, typer.Option(min=0, help="added to experts, relative to a matrix's deviation")] = 0.0,
    drop: Annotated[float, typer.Option(min=0, max=1, help="share of an expert's neurons that begin anew")] = 0.0,
    residual: Annotated[
        bool, typer.Option("--residual", help="keep the FFN beside experts that add nothing at first")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="of the router's weights, noise and fresh neurons")] = 0,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    check_logits: Check = True,
    as_json: Json = False,
) -> None:
    """Copy the FFNs of a dense model into experts; the model computes the same at first, or the gap is told."""
    from checkpoint_tools import upcycle

    check_output_folder(out, overwrite=overwrite)
    options = upcycle.UpcycleOptions(
        num_experts=num_experts,
        top_k=top_k,
        granularity=granularity,
        seed=seed,
        gate=gate,
        gate_hidden_size=gate_hidden_size,
        gate_init=gate_init,
        score=score,
        scale=scale,
        start_layer=start_layer,
        layer_step=layer_step,
        experts_per_layer=upcycle.parse_experts(experts_per_layer),
        noise=noise,
        drop=drop,
        residual=residual,
    )
    _run(upcycle.prepare(source, out, options), How(overwrite, resume, check_logits), dry_run, as_json)


@app.command("describe-split")
def describe_split_command(
    checkpoint: Annotated[Path, typer.Argument(help="that `split` has made")],
    picture: Annotated[Path | None, typer.Option(help="also draw it, as .png, .svg or .pdf")] = None,
    importance: Annotated[Path | None, typer.Option(help="scores that it was made from, to draw them too")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Which experts share neurons, how large they are, and how far scores told neurons apart."""
    from checkpoint_tools.importance import Importance
    from checkpoint_tools.split_report import describe_split, read_split, save_split_picture
    from ep_engine.c2r.collaboration_report import picture_kind

    if importance is not None and picture is None:
        raise UserError(f"--importance ({importance}) has no effect without --picture, where it is drawn; name one")
    if picture is not None:
        check_output_file(picture, overwrite=overwrite)
        picture_kind(picture)
    record = read_split(checkpoint)
    found = describe_split(record)
    if picture is not None:
        shape = record["num_experts"], record["intermediate_size"], record.get("residual_experts", 0)
        on = record.get("on", "up_proj")
        scores = None if importance is None else Importance(importance, on, *shape)
        save_split_picture(picture, record, scores)
    if as_json:
        print_json(found)
    else:
        typer.echo(
            f"{checkpoint}: experts of {found['smallest_expert']} to {found['largest_expert']} neurons, "
            f"{found['neurons_in_several']:.1%} of neurons in several, {found['neurons_in_none']:.1%} in none, two "
            f"experts share {found['overlap']:.1%}"
        )


@app.command("calibrate")
def calibrate_command(
    folder: Annotated[Path, typer.Argument(help="engine checkpoint of a split model, whose model.json is changed")],
    dense: Annotated[Path, typer.Argument(help="what it was split from")],
    corpus: Corpus,
    max_tokens: Annotated[int, typer.Option(min=1, help="of the corpus")] = 4096,
    sequence_length: Annotated[int, typer.Option(min=1, help="tokens of a row")] = 512,
    as_json: Json = False,
) -> None:
    """Set a score scale for each layer, so that experts add as much to the residual stream as the FFN did."""
    from checkpoint_tools.calibrate import calibrate

    scales = calibrate(folder, dense, corpus, max_tokens=max_tokens, sequence_length=sequence_length)
    if as_json:
        print_json({"score_scale": scales})
    else:
        typer.echo(f"set score scales of {len(scales)} layers in {folder}, {min(scales):.3f} to {max(scales):.3f}")


@app.command("verify")
def verify_command(
    first: Folder,
    second: Folder,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="every expert on: a split model against its source")
    ] = False,
    logits: Annotated[
        bool, typer.Option("--logits", help="compare logits alone: an upcycled model against its source")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random tokens")] = 0,
    tolerance: Annotated[float, typer.Option(min=0.0, help="relative to the largest logit, fp32")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Compare two model folders; exit status 1 if they are not the same model."""
    from checkpoint_tools.verify import verify

    found = verify(first, second, all_experts=all_experts, logits_alone=logits, seed=seed, tolerance=tolerance)
    if as_json:
        print_json(found.to_json())
    else:
        typer.echo("\n".join(found.sentences()))
    if not found.same:
        raise typer.Exit(1)


def _run(conversion: Conversion, how: How, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        need = conversion.estimate()
        if as_json:
            print_json(need.to_json())
            return
        typer.echo(
            f"{conversion.out} would have {need.output_bytes / 2**30:.2f} GiB ({need.free_bytes / 2**30:.2f} GiB are "
            f"free), written in about {need.seconds:.0f} s with at most {need.memory_bytes / 2**30:.2f} GiB of memory"
        )
        return
    gap = conversion.run(how)
    model = conversion.model
    if as_json:
        found = {"written": str(conversion.out), "model": model.model_dump(exclude={"carried"})}
        print_json(found | {"logit_gap": None if gap is None else gap.max_abs_diff})
        return
    moe = None if model.is_dense else model.moe
    experts = "dense" if moe is None else f"{moe.num_experts} experts, top-{moe.top_k}"
    typer.echo(f"wrote {conversion.out}: {model.num_layers} layers, {experts}")
    if gap is not None and gap.first_difference is not None:
        typer.echo(
            f"logits differ from those of the source by up to {gap.max_abs_diff:.3g} (logits up to "
            f"{gap.logit_scale:.3g})"
        )
