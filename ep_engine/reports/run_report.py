"""The report of a run: one HTML page that opens without network, from what stands in the run folder at that moment."""

import html
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ep_engine.ledger import DIRECTIONS, TIERS
from ep_engine.output import whole_file
from ep_engine.reports import drawing
from ep_engine.reports.run_numbers import loads_of, names_under, series

_COLUMNS = 60  # of a heat map over time, at most
_CELLS = 40_000  # of all heat maps of a kind together: more make a page that browsers are slow with
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } table { border-collapse: collapse; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; }
th:first-child, td:first-child, .figures td { text-align: left; }
.all { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: 1rem 2rem; }
.all.small { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; } .missing, .about { color: #555; }
.legend { margin: 0; font-size: 12px; } .legend span { margin-right: .8rem; white-space: nowrap; }
.legend i, .parts i { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; }
svg text { font: 10.5px system-ui, sans-serif; fill: #444; } svg .grid { stroke: #e5e5e5; }
svg polyline { fill: none; stroke-width: 1.6; } svg .mark { stroke: #888; stroke-dasharray: 2 3; }
.map { display: grid; grid-template-columns: 1.2rem 1fr auto; font-size: 11px; color: #444; }
.map .rows { writing-mode: vertical-rl; transform: rotate(180deg); text-align: center; }
.map .cells { grid-column: 2 / 4; width: 100%; height: 11rem; shape-rendering: crispEdges; }
.small .cells { aspect-ratio: 1; height: auto; } .cells rect { width: 1px; height: 1px; }
.map .from { grid-column: 2; } .map .to { grid-column: 3; }
.scale { margin: 0 0 0 1.2rem; font-size: 11px; color: #444; }
.scale i { display: inline-block; width: 8rem; height: .6rem; vertical-align: middle; }
.bar { display: flex; height: 1.4rem; margin: .4rem 0; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
"""


def write_run_report(path: Path, run: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the HTML file; one that stands there is replaced.
        run: from `read_run`.
    """
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(run['run'])}</title><style>{_STYLE}</style>",
        f"<h1>Run {html.escape(run['run'])}</h1>",
        _table(figures_of(run)),
        *(f"<p class='missing'>{html.escape(sentence)}.</p>" for sentence in run["missing"]),
        _section("Training", _training(run)),
        _section("Experts", _experts(run)),
        _section("Loads of experts over time", _loads(run), "1 is the mean of the layer. All layers share one scale."),
        _section("Who works with whom", _coactivation(run), "Share of a layer's co-activated pairs.", "small"),
        _section("Similarity of gates", _gates(run), "Cosine of the rows of the gate, expert by expert.", "small"),
        _section("Bytes", _bytes(run)),
        "<h2>Settings</h2>",
        *(f"<p>{html.escape(name)}</p><pre>{html.escape(text)}</pre>" for name, text in run["settings"].items()),
        "</html>",
    ]
    with whole_file(path) as beside:
        beside.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def figures_of(run: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that come first, by their name on the page."""
    lines, summary = run["lines"], run["summary"]
    if not lines:
        return {}
    last = lines[-1]
    found: dict[str, Any] = {"steps": last["step"], "tokens": last.get("tokens"), "last loss": last.get("loss")}
    if summary is not None:
        found |= {"held-out loss": summary.get("heldout_loss"), "ranks": summary.get("ranks")}
    for name, key in (("tokens per second", "tokens_per_second"), ("MFU", "mfu")):
        _, values = series(lines[1:] or lines, key)  # the first window pays for warm-up
        found |= {f"{name}, median": statistics.median(values)} if values else {}
    if "peak" in last:
        found |= {"MFU is of": f"{last['peak_tflops']:.4g} TFLOP/s a rank: {last['peak']}"}
    dropped = sum(layer["dropped"] for line in lines for layer in line.get("layers", ()))
    if "layers" in last:
        found |= {"dropped choices": dropped}
    return {name: value for name, value in found.items() if value is not None}


def _training(run: dict[str, Any]) -> list[str]:
    lines, resumed = run["lines"], run["resumed_at"]
    steps, losses = series(lines, "loss")
    loss = {"training": (steps, losses)}
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    over_tokens = {"training": (tokens, losses)} if len(tokens) == len(losses) else {}
    of_domains = {name: series(lines, "domains", name, "loss") for name in names_under(lines, "domains")}
    weights = {name: series(lines, "domains", name, "weight") for name in names_under(lines, "domains")}
    balance = {name: series(lines, "balance_losses", name) for name in names_under(lines, "balance_losses")}

    def over_steps(title: str, y: str, **keys: str) -> str:
        curves = {name.replace("_", " "): series(lines, key) for name, key in keys.items()}
        return drawing.chart(title, curves, x="step", y=y, marks=resumed)

    return [
        drawing.chart("Loss over steps", loss, x="step", y="nats per token", marks=resumed),
        drawing.chart("Loss over tokens", over_tokens, x="tokens", y="nats per token"),
        drawing.chart("Training loss of domains", of_domains, x="step", y="nats per token", marks=resumed),
        drawing.chart("Held-out loss", _heldout(run), x="step", y="nats per token", marks=resumed),
        drawing.chart("Weights of domains", weights, x="step", y="share of rows", marks=resumed),
        drawing.chart("Balance losses", balance, x="step", y="before their coefficients", marks=resumed),
        over_steps("Gradient norm", "norm", norm="grad_norm"),
        over_steps("Learning rate", "rate", rate="learning_rate"),
        over_steps("Tokens per second and rank", "tokens/s", rank="tokens_per_second_per_rank"),
        over_steps("MFU", "share of the peak", MFU="mfu"),
        _seconds(run),
    ]


def _heldout(run: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Of every domain, from the evaluations that lines tell of, and from the summary."""
    found: dict[str, dict[float, float]] = {}
    summary = run["summary"] or {}
    for line in run["lines"]:
        for name, loss in line.get("heldout", {}).get("loss", {}).items():
            found.setdefault(name, {})[line["heldout"]["step"]] = loss
    if summary.get("heldout_loss") is not None:
        last = summary.get("heldout_losses") or {"all": summary["heldout_loss"]}
        for name, loss in last.items():
            found.setdefault(name, {})[summary["steps"]] = loss
    return {name: (list(points), list(points.values())) for name, points in found.items()}


def _seconds(run: dict[str, Any]) -> str:
    """Means over all steps that were timed, but the first, which pays for warm-up."""
    told = [line["seconds_of_step"] for line in run["lines"] if "seconds_of_step" in line]
    told = told[1:] or told
    means = {name: statistics.fmean(one[name] for one in told) for name in told[0]} if told else {}
    return drawing.shares("Where the time of a step goes", {n: 1e3 * value for n, value in means.items()}, "ms")


def _experts(run: dict[str, Any]) -> list[str]:
    lines, resumed = run["lines"], run["resumed_at"]
    told = [line for line in lines if "layers" in line]
    if not told:
        return ["<p class='about'>No line of metrics.jsonl tells of experts: the model is dense.</p>"] if lines else []
    flat = [{"step": line["step"], **{str(layer["layer"]): layer for layer in line["layers"]}} for line in told]
    names = [str(layer["layer"]) for layer in told[-1]["layers"]]

    def by_layer(title: str, y: str, key: str) -> str:
        curves = {f"layer {name}": series(flat, name, key) for name in names}
        return drawing.chart(title, curves, x="step", y=y, marks=resumed)

    return [
        by_layer("Largest violation: the busiest expert over the mean, minus 1", "violation", "max_violation"),
        by_layer("Entropy of the mean probabilities", "nats", "entropy"),
        by_layer("Mean entropy of a token's probabilities", "nats", "token_entropy"),
        by_layer("Dropped choices", "choices", "dropped") if figures_of(run)["dropped choices"] else "",
        drawing.chart("Devices of a token", {"devices": series(lines, "devices_per_token")}, x="step", y="devices"),
    ]


def _loads(run: dict[str, Any]) -> Iterable[str]:
    _, layers = loads_of(run["lines"], 1)
    most = max(min(_COLUMNS, _CELLS // max(sum(len(load_EC) for _, load_EC in layers), 1)), 4)
    steps, layers = loads_of(run["lines"], most)
    top = max([2.0, *(float(load_EC.max()) for _, load_EC in layers)])
    for layer, load_EC in layers:
        yield drawing.heat_map(
            f"Load, layer {layer}", load_EC, least=0, most=top, rows="expert", columns="step", labels=steps
        )


def _coactivation(run: dict[str, Any]) -> list[str]:
    counts = [np.array(counts) for counts in (run["coactivation"] or {"counts": []})["counts"]]
    shared = [2 * count / max(count.sum(), 1) for count in counts]  # a pair stands twice
    layers = run["gates"]["layers"] if run["gates"] else [{"layer": i} for i in range(len(counts))]
    names = [f"Pairs, layer {layer['layer']}" for layer in layers]
    return _squares(list(zip(names, shared, strict=False)), least=0.0, most=None)


def _gates(run: dict[str, Any]) -> list[str]:
    layers = run["gates"]["layers"] if run["gates"] else []
    cosines = [(f"Gate, layer {layer['layer']}", np.array(layer["cosine"])) for layer in layers]
    if not cosines:
        return []
    apart = [cosine - 2 * np.eye(len(cosine)) for _, cosine in cosines]  # without those of an expert with itself
    least = min(float(cosine.min()) for _, cosine in cosines)
    return _squares(cosines, least=least, most=max(float(cosine.max()) for cosine in apart))


def _squares(named: list[tuple[str, Any]], *, least: float, most: float | None) -> list[str]:
    """Experts by experts, of as many layers as make a page of reasonable size; of `most` None each has its own."""
    room, drawn = _CELLS, list[str]()
    for name, values in named:
        room -= values.size
        if drawn and room < 0:
            text = f"{len(named) - len(drawn)} more layers are not drawn; `ep-engine report --json` has all."
            return [*drawn, f"<p class='about'>{text}</p>"]
        top = float(values.max()) if most is None else most
        labels = list(range(values.shape[1]))
        drawn.append(
            drawing.heat_map(name, values, least=least, most=top, rows="expert", columns="expert", labels=labels)
        )
    return drawn


def _bytes(run: dict[str, Any]) -> list[str]:
    lines = run["lines"]
    key = "bytes_per_token_by_tier"
    tiers = {name: series(lines, key, name) for name in names_under(lines, key)}
    directions = {name.replace("_", " "): series(lines, "bytes_per_token", name) for name in DIRECTIONS}
    if not any(steps for steps, _ in tiers.values()):
        return []
    charts = [
        drawing.chart("Bytes of a token that leave a rank, by tier", tiers, x="step", y="bytes"),
        drawing.chart("Bytes of a token that leave a rank, by direction", directions, x="step", y="bytes"),
    ]
    ledger = (run["summary"] or {}).get("ledger")
    return charts if ledger is None else [*charts, _ledger(ledger)]


def _ledger(ledger: dict[str, Any]) -> str:
    """Bytes of the whole run since its first step, by direction and tier."""
    sums = {d: {t: sum(layer["bytes"][d][t] for layer in ledger["layers"]) for t in TIERS} for d in DIRECTIONS}
    head = "<tr><th>bytes of the run</th>" + "".join(f"<th>{tier}</th>" for tier in TIERS) + "</tr>"
    rows = "".join(
        f"<tr><td>{direction.replace('_', ' ')}</td>"
        + "".join(f"<td data-bytes='{direction} {tier}'>{n}</td>" for tier, n in by_tier.items())
        + "</tr>"
        for direction, by_tier in sums.items()
    )
    return f"<figure><figcaption>Bytes by direction and tier</figcaption><table>{head}{rows}</table></figure>"


def _section(title: str, parts: Iterable[str], about: str = "", kind: str = "") -> str:
    body = "".join(parts)
    text = f"<p class='about'>{about}</p>" if about else ""
    return f"<h2>{title}</h2>{text}<div class='all {kind}'>{body}</div>" if body else ""


def _table(figures: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td data-figure='{name}' data-value='{html.escape(str(value))}'>{_said(value)}</td></tr>"
        for name, value in figures.items()
    )
    return f"<table class='figures'>{rows}</table>"


def _said(value: Any) -> str:
    if isinstance(value, int) or (isinstance(value, float) and value >= 1e4):
        return f"{value:,.0f}".replace(",", "&nbsp;")
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
