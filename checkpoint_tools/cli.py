"""The command line: `python -m checkpoint_tools inspect | split | upcycle | convert | export | verify`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ep_engine.command_line import print_json
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, help=__doc__)

Folder = Annotated[Path, typer.Argument(help="Hugging Face folder or engine checkpoint")]
Out = Annotated[Path, typer.Argument(help="folder to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a non-empty output folder")]
Method = Literal["random", "clustering", "gradient", "published"]
Metric = Literal["l2", "cos"]
Projection = Literal["up_proj", "gate_proj"]
Assignment = Literal["optimal", "greedy", "shared"]
Json = Annotated[bool, typer.Option("--json", help="report as JSON on stdout")]


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
def convert_command(source: Folder, out: Out, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Turn a Hugging Face folder into an engine checkpoint."""
    from checkpoint_tools.convert import convert

    _report_written(out, convert(source, out, overwrite=overwrite), as_json)


@app.command("export")
def export_command(source: Folder, out: Out, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Turn an engine checkpoint into a Hugging Face folder."""
    from checkpoint_tools.export import export

    _report_written(out, export(source, out, overwrite=overwrite), as_json)


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
    seed: Annotated[int, typer.Option(min=0, help="of the shuffles and of the router's weights")] = 0,
    gate: Annotated[str, typer.Option(help="router: mlp or linear")] = "mlp",
    score_scale: Annotated[
        float | None, typer.Option(help="factor on the combine weights [default: experts / top-k]")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split the FFNs of a dense model into experts; all experts together are the dense model, which is checked."""
    from checkpoint_tools.split import SplitOptions, split

    given = {
        "metric": metric != "l2",
        "on": on != "up_proj",
        "files": files,
        "importance": importance,
        "assignment": assignment != "optimal",
    }
    read = {
        "random": (),
        "clustering": ("metric", "on"),
        "gradient": ("on", "importance", "assignment"),
        "published": ("on", "files"),
    }[method]
    for name in (name for name, value in given.items() if value and name not in read):
        raise UserError(f"--{name} has no effect on --method {method}; leave it out")
    if method == "gradient" and importance is None:
        raise UserError("--method gradient needs --importance, the folder of scores; give it")
    if method == "published" and files is None:
        raise UserError("--method published needs --files, the folder of split files; give it")
    options = SplitOptions(
        num_experts, top_k, seed, gate, score_scale, method, metric, on, files, importance, assignment
    )
    _report_written(out, split(source, out, options, overwrite=overwrite), as_json)


@app.command("upcycle")
def upcycle_command(
    source: Folder,
    out: Out,
    num_experts: Annotated[int, typer.Option(min=1, help="experts per layer")],
    top_k: Annotated[int, typer.Option(min=1, help="experts per token")],
    granularity: Annotated[int, typer.Option(min=1, help="slices that an FFN is cut into before it is copied")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the router's weights")] = 0,
    gate: Annotated[str, typer.Option(help="router: linear or mlp")] = "linear",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy the FFNs of a dense model into experts; the model computes the same at first."""
    from checkpoint_tools.upcycle import UpcycleOptions, upcycle

    options = UpcycleOptions(num_experts, top_k, granularity, seed, gate)
    _report_written(out, upcycle(source, out, options, overwrite=overwrite), as_json)


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


def _report_written(out: Path, model: ModelConfig, as_json: bool) -> None:
    if as_json:
        print_json({"written": str(out), "model": model.model_dump(exclude={"carried"})})
    else:
        experts = f"{model.moe.num_experts} experts, top-{model.moe.top_k}" if model.moe else "dense"
        typer.echo(f"wrote {out}: {model.num_layers} layers, {experts}")
