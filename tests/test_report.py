"""The report: a page that needs no network, with the numbers of the table and pictures of the right data."""

import base64
import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from ep_engine.ledger import DIRECTIONS
from ep_engine.placement import Placement
from ep_engine.reports.report import (
    BYTE_COLUMNS,
    COLUMNS,
    byte_rows,
    draw_bytes,
    draw_bytes_by_layer,
    draw_coactivation,
    draw_losses,
    table_rows,
    write_report,
)
from tests.counts import profile_of, symmetric

NAMES = ("plain", "placed", "c2r", "c2r_grouped")


def arm(number: int) -> dict[str, Any]:
    """Figures that differ from those of every other arm."""
    by_direction = {direction: 100.0 * number + 10 * i for i, direction in enumerate(DIRECTIONS)}
    return {
        "heldout_loss": 4.0 + 0.1234 * number,
        "bytes_per_token": sum(by_direction.values()),
        "devices_per_token": 2.0 - 0.125 * number,
        "load_max_over_mean": 1.5 + 0.031 * number,
        "tokens_per_second": 5000.0 + 111 * number,
        "changed_share": 0.0421 * number,
        "bytes_by_direction": by_direction,
        "bytes_by_layer": [50.0 * number, 60.0 * number],
    }


ARMS = {name: arm(number) for number, name in enumerate(NAMES, start=1)}
# Arm i falls from 5 by 1 - i / 4 with every step: plain 4, 3, 2; c2r 4.5, 4, 3.5.
METRICS = {name: [{"step": step, "loss": 5 - step * (1 - i / 4)} for step in (1, 2, 3)] for i, name in enumerate(NAMES)}
SUMMARY = {
    "dense": {"heldout_loss": 4.3219, "unigram_entropy": 6.7891},
    "arms": ARMS,
    "ranks": 2,
    "machine": "x86 <64> & more, 2 cores",
    "seconds": 123.4,
    "peak_gib": 2.345,
}
# Layer 0: experts 1 and 4 serve most tokens together. Layer 1: 0 and 5, after placement on device 0.
PAIRS = symmetric(2, 6, [1] * 30)
PAIRS[0, 1, 4] = PAIRS[0, 4, 1] = 50
PAIRS[1, 0, 5] = PAIRS[1, 5, 0] = 70
PROFILE = profile_of(PAIRS)
BY_ID = Placement.contiguous(6, 2, 2)
PLACED = Placement(devices=2, factors=(2,), layers=[[0, 1, 4, 2, 3, 5], [0, 3, 5, 1, 2, 4]])


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open in ("td", "th") and data.strip():
            self.cells[-1].append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", SUMMARY, PROFILE, PLACED, BY_ID, METRICS)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_page_needs_no_network(page: Page, text: str) -> None:
    assert [value[:22] for value in page.values("src")] == ["data:image/png;base64,"] * 4
    assert page.values("href", "srcset", "data", "action", "poster") == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _, _ in page.attributes}
    for address in ("http://", "https://", "url(", "@import"):
        assert address not in text


def test_pictures_decode_and_differ(page: Page) -> None:
    sources = page.values("src")
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # not blank
    assert len(set(sources)) == 4


def test_no_figure_stays_open(text: str, tmp_path: Path) -> None:
    before = plt.get_fignums()
    write_report(tmp_path / "again.html", SUMMARY, PROFILE, PLACED, BY_ID, METRICS)
    assert plt.get_fignums() == before


def test_page_holds_the_numbers_of_the_table(page: Page) -> None:
    tables = [COLUMNS, *table_rows(ARMS), BYTE_COLUMNS, *byte_rows(ARMS)]
    assert page.cells == [list(row) for row in tables]


def test_table_by_hand() -> None:
    assert table_rows(ARMS)[1] == ("placed", "4.2468", "860", "1.750", "1.562", "5222", "8.4%")
    assert [row[0] for row in table_rows(ARMS)] == list(NAMES)
    assert all(len(row) == len(COLUMNS) for row in table_rows(ARMS))


def test_page_names_the_dense_model_the_machine_and_the_summary(page: Page) -> None:
    words = " ".join(page.words)
    for word in ("4.3219", "6.7891", "2 ranks", "123 s", "2.3 GiB", "x86 <64> & more, 2 cores"):
        assert word in words
    summary = next(word for word in page.words if word.lstrip().startswith("{"))
    assert json.loads(summary) == SUMMARY


def panels(figure: Figure) -> dict[tuple[str, int], Any]:
    """Axes by (way, layer): experts by id above, placed below, a column for each layer."""
    return {
        (way, layer): figure.axes[2 * row + layer] for row, way in enumerate(("by id", "placed")) for layer in (0, 1)
    }


def drawn(axis: Any) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


def hottest(axis: Any) -> set[str]:
    """Experts of the strongest cell, as the ticks name them."""
    row, column = np.unravel_index(drawn(axis).argmax(), drawn(axis).shape)
    ticks = [label.get_text() for label in axis.get_xticklabels()]
    assert ticks == [label.get_text() for label in axis.get_yticklabels()]
    return {ticks[row], ticks[column]}


def test_the_hot_pair_is_the_strongest_cell() -> None:
    axes = panels(draw_coactivation(PROFILE, PLACED, BY_ID))
    for way in ("by id", "placed"):
        assert hottest(axes[way, 0]) == {"1", "4"}
        assert hottest(axes[way, 1]) == {"0", "5"}


def test_cells_are_shares_in_the_order_of_slots() -> None:
    axes = panels(draw_coactivation(PROFILE, PLACED, BY_ID))
    for layer in (0, 1):
        shares = PAIRS[layer] / PAIRS[layer].sum()
        order = PLACED.layers[layer]
        assert np.array_equal(drawn(axes["by id", layer]), shares)
        assert np.array_equal(drawn(axes["placed", layer]), shares[order][:, order])
        assert [label.get_text() for label in axes["placed", layer].get_xticklabels()] == list(map(str, order))


def test_frames_stand_around_devices_and_titles_say_what_is_inside() -> None:
    axes = panels(draw_coactivation(PROFILE, PLACED, BY_ID))
    # layer 0: by id the hot pair lies on two devices; 6 of 64 pairs are inside, placed 55 of 64
    assert axes["by id", 0].get_title() == "layer 0, by id: 9% inside"
    assert axes["placed", 0].get_title() == "layer 0, placed: 86% inside"
    for axis in axes.values():
        frames = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches]
        assert frames == [((-0.5, -0.5), 3, 3), ((2.5, 2.5), 3, 3)]


def test_empty_slots_are_not_drawn() -> None:
    uneven = Placement(devices=2, factors=(2,), layers=[[4, 1, 0, 2, 3, -1]])
    profile = profile_of(symmetric(1, 5, list(range(10))))
    figure = draw_coactivation(profile, uneven, Placement.contiguous(5, 2, 1))
    placed = figure.axes[1]
    assert [label.get_text() for label in placed.get_xticklabels()] == ["4", "1", "0", "2", "3"]
    assert [(patch.get_xy()[0], patch.get_width()) for patch in placed.patches] == [(-0.5, 3), (2.5, 2)]


def test_a_layer_without_pairs_is_drawn() -> None:
    figure = draw_coactivation(
        profile_of(symmetric(1, 6, [0] * 15)), Placement.contiguous(6, 2, 1), Placement.contiguous(6, 2, 1)
    )
    assert [drawn(axis).max() for axis in figure.axes] == [0.0, 0.0]


def curves(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axis.lines}


def test_losses_are_drawn_for_every_arm_and_relative_to_the_first() -> None:
    above, below = draw_losses(METRICS).axes
    assert list(curves(above)) == list(curves(below)) == list(NAMES)
    assert curves(above)["c2r"] == [(1, 4.5), (2, 4.0), (3, 3.5)]
    assert curves(below)["c2r"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert curves(below)["plain"] == [(1, 0), (2, 0), (3, 0)]
    assert "plain" in below.get_ylabel()


def bars(figure: Figure) -> dict[str, BarContainer]:
    (axis,) = figure.axes
    return {container.get_label(): container for container in axis.containers}


def test_bars_of_directions_add_up_to_the_bytes_per_token() -> None:
    parts = bars(draw_bytes(ARMS))
    assert list(parts) == ["dispatch", "combine", "combine backward", "dispatch backward"]
    for i, name in enumerate(NAMES):
        ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in (part[i] for part in parts.values())]
        assert [start for start, _ in ends] == [0.0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == pytest.approx(ARMS[name]["bytes_per_token"])


def test_bars_of_layers_are_those_of_the_arms() -> None:
    figure = draw_bytes_by_layer(ARMS)
    assert {name: [bar.get_height() for bar in part] for name, part in bars(figure).items()} == {
        name: ARMS[name]["bytes_by_layer"] for name in NAMES
    }
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["layer 0", "layer 1"]
