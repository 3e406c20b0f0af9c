"""Drawings of the report of a run: SVG as text, with every number in an attribute of what shows it, and no script."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

WIDTH, HEIGHT = 480, 250  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 10, 36  # of what it plots
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe and Ito
_POINTS = 60  # up to which each has a mark of its own
_TITLED = 1000  # cells up to which each says its number under the mouse
SCALE = "YlOrRd"  # the more, the darker

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def chart(title: str, curves: Curves, *, x: str, y: str, marks: Sequence[float] = ()) -> str:
    """Curves of one kind over the same x, with a dotted line at each of `marks`; nothing if no curve has a point."""
    drawn = {name: curve for name, curve in curves.items() if curve[0]}
    if not drawn:
        return ""
    to_x = _Axis([value for xs, _ in drawn.values() for value in xs], _LEFT, WIDTH - _RIGHT)
    to_y = _Axis([value for _, ys in drawn.values() for value in ys], HEIGHT - _BOTTOM, _TOP, room=0.06)
    parts = [*_grid(to_x, to_y, x, y)]
    for mark in marks:
        at = to_x(mark)
        parts.append(f"<line class='mark' x1='{at}' x2='{at}' y1='{_TOP}' y2='{HEIGHT - _BOTTOM}'/>")
    colours = _colours(len(drawn))
    for colour, (name, (xs, ys)) in zip(colours, drawn.items(), strict=True):
        parts.append(_curve(name, xs, ys, colour, to_x, to_y))
    named = zip(colours, drawn, strict=True)
    legend = "".join(f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>" for colour, name in named)
    return _figure(title, f"<p class='legend'>{legend}</p>" if len(drawn) > 1 else "", _svg(title, parts))


def heat_map(
    title: str,
    values: NDArray[np.float64],
    *,
    least: float,
    most: float,
    rows: str,
    columns: str,
    labels: Sequence[Any],
) -> str:
    """(R, C) cells from light to dark, `least` to `most`; row 0 on top. `labels` are those of the columns."""
    num_rows, num_columns = values.shape
    shades = [to_hex(colour) for colour in colormaps[SCALE](np.linspace(0, 1, 256))]
    span = max(most - least, 1e-12)
    titled = values.size <= _TITLED
    cells = []
    for (row, column), value in np.ndenumerate(values):
        shade = shades[round(255 * min(max((float(value) - least) / span, 0.0), 1.0))]
        said = f"<title>{rows} {row}, {columns} {labels[column]}: {value:.4g}</title>" if titled else ""
        end = f">{said}</rect>" if titled else "/>"
        cells.append(f"<rect x='{column}' y='{row}' fill='{shade}' data-value='{value:.6g}'{end}")
    scale = ",".join(shades[::51])
    return _figure(
        title,
        "",
        f"<div class='map'><span class='rows'>{rows} 0 to {num_rows - 1}</span>"
        f"<svg viewBox='0 0 {num_columns} {num_rows}' preserveAspectRatio='none' role='img' class='cells' "
        f"aria-label='{html.escape(title)}' data-title='{html.escape(title)}'>{''.join(cells)}</svg>"
        f"<span class='from'>{columns} {labels[0]}</span><span class='to'>{labels[-1]}</span></div>"
        f"<p class='scale'>{least:.3g} <i style='background:linear-gradient(90deg,{scale})'></i> {most:.3g}</p>",
    )


def shares(title: str, values: Mapping[str, float], unit: str) -> str:
    """Parts of a whole: a bar, and a table of them."""
    total = sum(values.values())
    if total <= 0:
        return ""
    colours = _colours(len(values))
    bar = "".join(
        f"<i style='width:{100 * value / total:.2f}%;background:{colour}' title='{name}'></i>"
        for colour, (name, value) in zip(colours, values.items(), strict=True)
    )
    rows = "".join(
        f"<tr><td><i style='background:{colour}'></i>{html.escape(name)}</td><td data-part='{html.escape(name)}' "
        f"data-value='{value!r}'>{value:.4g} {unit}</td><td>{value / total:.1%}</td></tr>"
        for colour, (name, value) in zip(colours, values.items(), strict=True)
    )
    return _figure(title, "", f"<div class='bar'>{bar}</div><table class='parts'>{rows}</table>")


class _Axis:
    """From values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, room: float = 0.0) -> None:
        low, high = min(values), max(values)
        spare = (high - low) * room if high > low else abs(high) * 0.1 or 1.0
        self.low, self.high, self._start, self._end = low - spare, high + spare, start, end
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
        self.ticks = {float(tick): _short(tick, digits) for tick in ticks if self.low <= tick <= self.high}

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start), 1)


def _grid(to_x: _Axis, to_y: _Axis, x: str, y: str) -> list[str]:
    parts = []
    for tick, words in to_y.ticks.items():
        at = to_y(tick)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{WIDTH - _RIGHT}' y1='{at}' y2='{at}'/>")
        parts.append(f"<text x='{_LEFT - 5}' y='{at + 4}' text-anchor='end'>{words}</text>")
    for tick, words in to_x.ticks.items():
        parts.append(f"<text x='{to_x(tick)}' y='{HEIGHT - _BOTTOM + 14}' text-anchor='middle'>{words}</text>")
    parts.append(f"<text x='{(_LEFT + WIDTH) / 2}' y='{HEIGHT - 5}' text-anchor='middle'>{html.escape(x)}</text>")
    middle = (HEIGHT - _BOTTOM) / 2
    turned = f"transform='rotate(-90 11 {middle})'"
    parts.append(f"<text x='11' y='{middle}' text-anchor='middle' {turned}>{html.escape(y)}</text>")
    return parts


def _curve(name: str, xs: Sequence[float], ys: Sequence[float], colour: str, to_x: _Axis, to_y: _Axis) -> str:
    places = [(to_x(x), to_y(y)) for x, y in zip(xs, ys, strict=True)]
    data = f"data-name='{html.escape(name)}' data-x='{json.dumps(list(xs))}' data-y='{json.dumps(list(ys))}'"
    line = f"<polyline {data} stroke='{colour}' points='{' '.join(f'{a},{b}' for a, b in places)}'/>"
    if len(places) > _POINTS:
        return line
    return line + "".join(
        f"<circle cx='{a}' cy='{b}' r='2.2' fill='{colour}'><title>{html.escape(name)}, {x:g}: {y:.6g}</title></circle>"
        for (a, b), x, y in zip(places, xs, ys, strict=True)
    )


def _colours(count: int) -> list[str]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 0.95, count))]


def _short(value: float, digits: int) -> str:
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{letter}"
    return f"{value:.{digits}f}"


def _svg(title: str, parts: Sequence[str]) -> str:
    label = html.escape(title)
    head = f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}' data-title='{label}'>"
    return f"{head}{''.join(parts)}</svg>"


def _figure(title: str, above: str, drawing: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{above}{drawing}</figure>"
