"""The command line, `ep-engine ...`: see `ep-engine --help`."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ep_engine.command_line import exit_with_sentence, print_json, report
from ep_engine.command_options import Json, Overwrite, Timeout
from ep_engine.data.data_commands import tokenize_command, tokenizer_command
from ep_engine.inference.model_commands import evaluate_command, generate_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Objective = Literal["pairs", "distinct-devices"]


@app.command("quickstart")
def quickstart_command(
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/quickstart"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Go the whole way: text, a dense model, experts, placement, four ways to route, a report, an export."""
    # transformers, when first imported, decides where to copy the code of the export: not into the user's cache.
    os.environ.setdefault("HF_MODULES_CACHE", str((out / "hf_modules").resolve()))
    from rich.console import Console

    from ep_engine.quickstart import print_table, quickstart

    summary = quickstart(out, overwrite=overwrite)
    if as_json:
        print_json(summary)
    else:
        print_table(summary, Console())


@app.command("train")
def train_command(
    run_file: Annotated[Path, typer.Argument(help="TOML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    check_for: Annotated[int | None, typer.Option(min=1, help="only check the run, for this many ranks")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="of --check-for, on every node [all]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train; under torchrun on as many ranks as it starts. Started again, they go on from the last checkpoint."""
    from ep_engine import job
    from ep_engine.c2r.constrain import in_no_list
    from ep_engine.config import load_config
    from ep_engine.mesh import World
    from ep_engine.resolve import resolve
    from ep_engine.training.trainer import train

    world = World.from_environment()
    config = load_config(run_file, overrides or [])
    restarted = job.has_begun(config.output.folder)
    run = resolve(
        config,
        check_for or world.size,
        ranks_per_node=ranks_per_node if check_for else world.local_size,
        overwrite=overwrite,
        restarted=restarted,
    )
    if world.rank == 0:
        for layer, experts in in_no_list(run.model).items():
            typer.echo(
                f"layer {layer}: experts {experts} are among the first T collaborators of nobody, and serve only "
                "tokens whose first choice they are",
                err=True,
            )
    if check_for is not None:
        return
    device = world.pick_device(config.parallel.device)
    if world.rank == 0 and restarted:
        where = f"going on from {run.resume}" if run.resume else "there is no checkpoint yet, beginning again"
        typer.echo(f"the ranks of this job were started again; {where}", err=True)
    if world.rank == 0:
        typer.echo(f"{world.size} ranks on {device.type} (parallel.device = {config.parallel.device})", err=True)
    summary = train(run, world, report=_print_line)
    if summary.get("stopped") == "SIGTERM":
        job.tell_stopped(world.local_rank)
    if as_json and world.rank == 0:
        print_json(summary)


@app.command("plan")
def plan_command(
    run_file: Annotated[Path, typer.Argument(help="TOML file of the run")],
    ranks: Annotated[int, typer.Option(min=1, help="of the job")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="of the job [all]")] = None,
    trace: Annotated[Path | None, typer.Option(help=".npz with `ids` (L, T, K), or a profile [uniform]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the routing, where it is drawn")] = 0,
    as_json: Json = False,
) -> None:
    """Say what a run will need and send on every rank, without starting it; no data, weights or devices are needed."""
    from rich.console import Console

    from ep_engine.config import load_config
    from ep_engine.planning.plan_run import plan_run, print_plan

    config = load_config(run_file, overrides or [])
    plan = plan_run(config, ranks, ranks_per_node=ranks_per_node, trace=trace, seed=seed)
    if as_json:
        print_json(plan)
    else:
        print_plan(plan, Console())


@app.command("profile")
def profile_command(
    model: Annotated[Path, typer.Argument(help="engine checkpoint of a MoE model, or published counts (.pkl)")],
    out: Annotated[Path, typer.Option(help="profile.npz to write")],
    corpus: Annotated[list[Path] | None, typer.Option(help="text or .jsonl files, or folders of them")] = None,
    tokens: Annotated[Path | None, typer.Option(help="token file, named without suffix, instead")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to run")] = 100_000,
    sequence_length: Annotated[int, typer.Option(min=1, help="tokens of a window")] = 128,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    trace: Annotated[Path | None, typer.Option(help="also write the experts of every token")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="and their logits, to try other rules on the trace")] = False,
    picture: Annotated[Path | None, typer.Option(help="also draw them, as .png, .svg or .pdf")] = None,
    top_k: Annotated[int | None, typer.Option(help="experts per token, for published counts")] = None,
    timeout_s: Timeout = 300.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Count on text which experts serve tokens together; under torchrun on as many ranks as it starts."""
    from ep_engine.c2r.collaboration_report import describe_collaboration, picture_kind, save_picture
    from ep_engine.c2r.profile import Profiled, profile, token_file
    from ep_engine.c2r.published import read_published_counts, refuse_unread
    from ep_engine.errors import UserError
    from ep_engine.mesh import World
    from ep_engine.output import check_output_file
    from ep_engine.planning.routing_trace import save_trace
    from ep_engine.progress import bar

    world = World.from_environment()
    for path in (out, trace, picture):
        if path is not None:
            check_output_file(path, overwrite=overwrite)
    if picture is not None:
        picture_kind(picture)
    if scores and trace is None:
        raise UserError("--scores has no effect without --trace, the file they go to; name one")
    if model.suffix == ".pkl":
        refuse_unread(model, {"--corpus": corpus, "--tokens": tokens, "--trace": trace})
        found = Profiled(read_published_counts(model, top_k), halves=[])
    else:
        text_of = token_file(model, corpus, tokens, max_tokens + 1, seed)
        with text_of as text, bar("profiling", max_tokens, show=world.rank == 0) as advance:
            found = profile(
                model,
                text,
                max_tokens=max_tokens,
                sequence_length=sequence_length,
                seed=seed,
                keep_ids=trace is not None,
                keep_scores=scores,
                world=world,
                timeout_s=timeout_s,
                advance=advance,
            )
    if world.rank > 0:
        return
    counted = found.profile
    counted.save(out)
    if trace is not None and found.ids_LTK is not None:
        save_trace(trace, found.ids_LTK, found.scores_LTE)
    described = describe_collaboration(counted)
    if picture is not None:
        save_picture(picture, counted, found.halves)
    agree = found.halves[-1][1] if found.halves else None
    report(
        {"written": str(out), "layers": counted.num_layers, "experts": counted.num_experts, **counted.about}
        | {"collaboration": described, "halves": found.halves},
        as_json,
        f"wrote {out}: {counted.num_layers} layers, {counted.about['tokens']} tokens, collaboration "
        f"{described['collaboration']:.3f}, load max/mean {described['load_max_over_mean']:.3f}"
        + (f", its halves agree to {agree:.3f} (profile more tokens if that is not near 1)" if agree else ""),
    )


@app.command("place")
def place_command(
    out: Annotated[Path, typer.Option(help="placement.json to write")],
    profile: Annotated[Path | None, typer.Argument(help="profile.npz of `ep-engine profile`")] = None,
    from_run: Annotated[Path | None, typer.Option(help="run folder, whose last steps are the profile instead")] = None,
    devices: Annotated[int | None, typer.Option(help="that share the experts of a layer [as in the run]")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="that the devices are part of [as in the run or 1]")] = None,
    objective: Annotated[Objective, typer.Option(help="what is made best; the two are one for top_k 2")] = "pairs",
    trace: Annotated[Path | None, typer.Option(help="experts of every token, for distinct-devices")] = None,
    load_cap: Annotated[str, typer.Option(help="most tokens of a device relative to the mean, or none")] = "1.1",
    strict: Annotated[bool, typer.Option("--strict", help="refuse a cap that cannot be held")] = False,
    replicas: Annotated[int, typer.Option(min=0, help="copies of busy experts to report the load for")] = 0,
    check: Annotated[
        Path | None, typer.Option(help="profile of other text, to see whether the answer holds there")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="seconds for the search [it ends by itself]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the search")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find which experts to put on one device, from who works with whom."""
    from rich.console import Console

    from ep_engine.c2r.collaboration import read_profile
    from ep_engine.c2r.place import asked_of, check_fits, on_other_text, parse_cap, place, print_placement
    from ep_engine.output import check_output_file
    from ep_engine.planning.routing_trace import read_ids
    from ep_engine.progress import bar

    cap = parse_cap(load_cap)
    check_output_file(out, overwrite=overwrite)
    path, devices, nodes = asked_of(profile, from_run, devices, nodes)
    counted = read_profile(path)
    check_fits(counted, devices, path)
    other = None if check is None else read_profile(check)
    ids = None if trace is None else read_ids(trace, counted.experts_of_layer, counted.top_k).numpy()
    with bar("placing layers", counted.num_layers) as advance:
        placement, found = place(
            counted,
            devices,
            nodes=nodes,
            objective=objective,
            ids_LTK=ids,
            load_cap=cap,
            strict=strict,
            replicas=replicas,
            seed=seed,
            time_limit=time_limit,
            advance=advance,
        )
    if other is not None and check is not None:
        found["check"] = on_other_text(placement, other, check)
    placement.save(out, measured=found)
    if as_json:
        print_json({"written": str(out), **found})
    else:
        print_placement(found, out, Console())


@app.command("simulate")
def simulate_command(
    trace: Annotated[Path, typer.Argument(help="of `ep-engine profile --trace`; with --scores for rules but topk")],
    run: Annotated[Path, typer.Option(help="TOML file of the run: model, batch, layout")],
    cluster: Annotated[Path, typer.Option(help="TOML file of the devices and links; see launch/clusters")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, of the run")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="topk, c2r:T, c2r_grouped:T:M, group_limited:GROUPS:M")] = None,
    placement: Annotated[list[str] | None, typer.Option(help="placement.json, or contiguous [the run's]")] = None,
    profile: Annotated[Path | None, typer.Option(help="of the lists of C2R [the run's]")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="[as the cluster's file says]")] = None,
    network_gbit: Annotated[float | None, typer.Option(min=0, help="Gbit/s between nodes [as it says]")] = None,
    as_json: Json = False,
) -> None:
    """Predict the step time, the slowest rank and the memory of a run on a cluster, for rules and placements."""
    from rich.console import Console

    from ep_engine.config import load_config
    from ep_engine.planning.cluster import read_cluster
    from ep_engine.planning.simulate import simulate
    from ep_engine.planning.what_if import print_comparison, variants

    config = load_config(run, overrides or [])
    there = read_cluster(cluster).changed(nodes, network_gbit)
    found = [simulate(one, there, trace) for one in variants(config, rule or [], placement or [], profile)]
    if as_json:
        print_json({"cluster": there.model_dump(), "cases": found})
    else:
        print_comparison(found, Console())


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="run folder: of a run that has ended, or still goes on")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write [RUN/report.html, again and again]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw what a run left in its folder as one HTML page that opens without network."""
    from ep_engine.output import check_output_file
    from ep_engine.reports.run_numbers import read_run
    from ep_engine.reports.run_report import figures_of, write_run_report

    found = read_run(run)
    page = out or run / "report.html"
    check_output_file(page, overwrite=overwrite or out is None)
    write_run_report(page, found)
    sentences = [f"wrote {page}: {len(found['lines'])} lines of metrics", *found["missing"]]
    report({"written": str(page), "figures": figures_of(found), **found}, as_json, "\n".join(sentences))


app.command("tokenizer")(tokenizer_command)
app.command("tokenize")(tokenize_command)
app.command("generate")(generate_command)
app.command("evaluate")(evaluate_command)


def _print_line(line: dict[str, Any]) -> None:
    typer.echo(
        f"step {line['step']:>6}  loss {math.nan if line['loss'] is None else line['loss']:.4f}  norm "
        f"{line['grad_norm']:.3f}  "
        f"{line['tokens_per_second']:.0f} tokens/s",
        err=True,
    )
    if alarm := line.get("placement", {}).get("alarm"):
        typer.echo(f"step {line['placement']['step']:>6}  {alarm}", err=True)
    sys.stderr.flush()


def main() -> None:
    """Entry point of `ep-engine`."""
    exit_with_sentence(app)


if __name__ == "__main__":
    main()
