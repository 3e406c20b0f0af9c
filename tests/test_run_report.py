"""The report of a run: its numbers are those of the folder, it needs no network, and it says what is not there."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ep_engine.c2r.collaboration import read_profile
from ep_engine.cli import app
from ep_engine.command_line import exit_with_sentence
from ep_engine.errors import UserError
from ep_engine.reports.drawing import chart, heat_map, shares
from ep_engine.reports.run_numbers import loads_of, read_run, series
from ep_engine.reports.run_report import write_run_report
from ep_engine.stopwatch import PARTS
from ep_engine.whole_model import read_model
from tests.distributed import run_ranks
from tests.run_cases import moe_folder, small_run, train_here
from tests.small_models import run_tool


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def curve(self, title: str, name: str) -> list[tuple[float, float]]:
        """The points of a curve of the chart of that title."""
        inside = False
        for tag, attributes in self.elements:
            inside = attributes.get("data-title") == title if tag == "svg" else inside
            if inside and tag == "polyline" and attributes["data-name"] == name:
                return list(zip(json.loads(attributes["data-x"]), json.loads(attributes["data-y"]), strict=True))
        raise AssertionError(f"no curve {name} in {title}")

    def cells(self, title: str) -> list[dict[str, str]]:
        """The cells of a heat map."""
        found, inside = [], False
        for tag, attributes in self.elements:
            inside = attributes.get("data-title") == title if tag == "svg" else inside
            if inside and tag == "rect":
                found.append(attributes)
        return found

    def values(self, attribute: str) -> dict[str, str]:
        """`data-value`, or the words, of what has an attribute, by its value."""
        return {a[attribute]: a.get("data-value", "") for _, a in self.elements if attribute in a}


def _train(rank: int, world_size: int, *configs: Any) -> None:
    for config in configs:
        train_here(config, rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: on two ranks, resumed after step 4; `dense`."""
    folder = moe_folder(tmp_path_factory.mktemp("runs"))
    sections: dict[str, Any] = {"model": {"checkpoint": str(folder / "moe")}, "parallel": {"expert_parallel_size": 2}}
    first, then = (
        small_run(folder, "run", **sections, train={"steps": steps, "save_every": 4}, output={"resume": steps > 4})
        for steps in (4, 8)
    )
    run_ranks(_train, first)
    run_ranks(_train, then)
    train_here(small_run(folder, "plain", train={"steps": 4}))
    return folder


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def page_of(run: Path, tmp_path: Path) -> Page:
    write_run_report(tmp_path / "page.html", read_run(run))
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ep-engine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            exit_with_sentence(app)
    return int(stopped.value.code or 0)


def test_curves_are_those_of_the_lines(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "run", tmp_path)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    steps = [line["step"] for line in lines]
    for title, name, key in (
        ("Loss over steps", "training", "loss"),
        ("Gradient norm", "norm", "grad_norm"),
        ("Learning rate", "rate", "learning_rate"),
        ("Tokens per second and rank", "rank", "tokens_per_second_per_rank"),
        ("MFU", "MFU", "mfu"),
        ("Devices of a token", "devices", "devices_per_token"),
    ):
        assert page.curve(title, name) == [(line["step"], line[key]) for line in lines], title
    assert page.curve("Loss over tokens", "training") == [(line["tokens"], line["loss"]) for line in lines]
    balance = [line["balance_losses"]["switch"] for line in lines]
    assert page.curve("Balance losses", "switch") == list(zip(steps, balance, strict=True))
    tier = [line["bytes_per_token_by_tier"]["node"] for line in lines]
    assert page.curve("Bytes of a token that leave a rank, by tier", "node") == list(zip(steps, tier, strict=True))
    for layer in (0, 1):
        entropy = [line["layers"][layer]["entropy"] for line in lines]
        found = page.curve("Entropy of the mean probabilities", f"layer {layer}")
        assert found == list(zip(steps, entropy, strict=True))
    summary = json.loads((folder / "run/summary.json").read_text())
    assert page.curve("Held-out loss", "all") == [(8, summary["heldout_loss"])]
    parts = page.values("data-part")
    assert set(parts) == set(PARTS)
    mean = np.mean([line["seconds_of_step"]["attention"] for line in lines[1:]])
    assert float(parts["attention"]) == pytest.approx(1e3 * mean)
    assert page.values("data-figure")["last loss"] == str(lines[-1]["loss"])


def test_maps_are_those_of_loads_pairs_and_gates(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "run", tmp_path)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    counts = read_profile(folder / "run/profile.npz").counts
    _, tensors = read_model(folder / "run/checkpoints/step_000008")
    for layer in (0, 1):
        loads = np.array([line["layers"][layer]["load"] for line in lines]).T
        cells = page.cells(f"Load, layer {layer}")
        shown = np.zeros_like(loads, dtype=float)
        for cell in cells:
            shown[int(cell["y"]), int(cell["x"])] = float(cell["data-value"])
        np.testing.assert_allclose(shown, loads / loads.mean(axis=0), rtol=1e-5)
        pairs = [float(cell["data-value"]) for cell in page.cells(f"Pairs, layer {layer}")]
        np.testing.assert_allclose(pairs, 2 * counts[layer].ravel() / counts[layer].sum(), rtol=1e-5)
        rows = tensors[f"layers.{layer}.moe.router.w_out"]
        cosine = torch.cosine_similarity(rows[:, None], rows[None], dim=2)
        gates = [float(cell["data-value"]) for cell in page.cells(f"Gate, layer {layer}")]
        np.testing.assert_allclose(gates, cosine.numpy().ravel(), rtol=1e-4, atol=1e-5)  # six digits are written


def test_the_page_needs_no_network_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "run", tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.elements}
    assert not {"src", "href", "srcset", "action", "data"} & {name for _, found in page.elements for name in found}
    assert not [word for word in ("http://", "https://", "url(", "@import") if word in text]


def test_a_resumed_run_shows_where_and_with_what(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "run", tmp_path)
    assert {"run.toml", "run.from-4.toml"} <= set(page.words)
    assert len([1 for tag, found in page.elements if found.get("class") == "mark"]) >= 5
    assert read_run(folder / "run")["resumed_at"] == [4]
    assert read_run(folder / "run")["missing"] == []


def test_a_running_run_is_told_as_far_as_it_went(folder: Path, tmp_path: Path) -> None:
    run = copy_of(folder / "run", tmp_path)
    for name in ("summary.json", "profile.npz"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    page = page_of(run, tmp_path)
    assert [step for step, _ in page.curve("Loss over steps", "training")] == [2, 4]
    missing = [words for words in page.words if "not there" in words or "holds none" in words]
    assert missing == [
        "summary.json is not there: the run has not ended.",
        "profile.npz is not there: it is written after a save, where output.watch is set.",
        "checkpoints holds none: gates are read from the last one.",
    ]
    (run / "metrics.jsonl").unlink()
    assert (
        "metrics.jsonl has no line yet: a run writes one every train.log_every steps." in page_of(run, tmp_path).words
    )
    (run / "run.toml").unlink()
    with pytest.raises(UserError, match=r"copy is no run folder \(no run\.toml, no metrics\.jsonl\); name the output"):
        read_run(run)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    run = copy_of(folder / "run", tmp_path)
    (run / "profile.npz").write_bytes(b"no archive")
    (run / "summary.json").write_text("{")
    for file in (run / "checkpoints/step_000008/weights").glob("*.distcp"):
        file.write_bytes(b"nothing")
    missing = read_run(run)["missing"]
    assert [sentence.partition(" cannot be read: ")[0] for sentence in missing] == [
        "summary.json",
        "profile.npz",
        "step_000008",
    ]
    page_of(run, tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"loss": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no line of metrics \('\{\"loss\": 3\}'\); take it"):
        read_run(run)


def test_a_dense_run_says_that_it_is_one(folder: Path, tmp_path: Path) -> None:
    page = page_of(folder / "plain", tmp_path)
    assert [step for step, _ in page.curve("Loss over steps", "training")] == [2, 4]
    assert "No line of metrics.jsonl tells of experts: the model is dense." in page.words
    assert read_run(folder / "plain")["missing"] == []


def test_layers_of_a_pyramid_have_maps_of_their_own_width(folder: Path, tmp_path: Path) -> None:
    sizes = ("--experts-per-layer", "4,8", "--top-k", 2, "--noise", 0.1)
    assert run_tool("upcycle", folder / "dense", folder / "pyramid", *sizes) == 0
    train_here(small_run(folder, "uneven", model={"checkpoint": str(folder / "pyramid")}, train={"steps": 2}))
    page = page_of(folder / "uneven", tmp_path)
    for layer, experts in enumerate((4, 8)):
        assert len(page.cells(f"Load, layer {layer}")) == experts
        assert len(page.cells(f"Pairs, layer {layer}")) == len(page.cells(f"Gate, layer {layer}")) == experts**2
        shares = [float(cell["data-value"]) for cell in page.cells(f"Load, layer {layer}")]
        assert np.mean(shares) == pytest.approx(1, rel=1e-5)


def test_losses_of_domains_and_other_balance_losses_are_drawn(tmp_path: Path) -> None:
    lines = [
        {
            "step": n,
            "loss": 3.0,
            "heldout": {"step": 2 * (n // 2), "loss": {"code": 2.0 + n // 2, "news": 1.0}},
            "domains": {"code": {"weight": n / 4, "rows": n, "loss": None if n == 2 else 3.0 - n / 2}},
            "balance_losses": {"z": n / 10},
        }
        for n in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(tmp_path, tmp_path)
    assert page.curve("Held-out loss", "code") == [(0, 2.0), (2, 3.0)]
    assert page.curve("Training loss of domains", "code") == [(1, 2.5), (3, 1.5)]  # it was not read in between
    assert page.curve("Weights of domains", "code") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert page.curve("Balance losses", "z") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_layers_of_other_widths_and_long_runs_are_folded() -> None:
    lines = [
        {"step": n, "layers": [{"layer": 1, "load": [n, 0]}, {"layer": 4, "load": [1, 1, 4]}]} for n in range(1, 8)
    ]
    steps, layers = loads_of(lines, 3)
    assert steps == [3, 5, 7]
    assert [layer for layer, _ in layers] == [1, 4]
    np.testing.assert_allclose(layers[0][1], [[2, 2, 2], [0, 0, 0]])
    np.testing.assert_allclose(layers[1][1], [[0.5] * 3, [0.5] * 3, [2] * 3])
    assert loads_of([], 3) == ([], [])


def test_what_is_no_number_is_left_out() -> None:
    lines = [{"step": 1, "a": {"b": 1.0}}, {"step": 2, "a": {"b": float("nan")}}, {"step": 3}, {"step": 4, "a": 5}]
    assert series(lines, "a", "b") == ([1], [1.0])
    assert series(lines, "a") == ([4], [5])


def test_drawings_take_what_there_is() -> None:
    assert chart("t", {"a": ([], [])}, x="x", y="y") == ""
    assert shares("t", {"a": 0.0}, "ms") == ""
    one = Page(chart("<t>", {"a & b": ([3], [7.0])}, x="x", y="y"))
    assert one.curve("<t>", "a & b") == [(3, 7.0)]
    constant = Page(heat_map("m", np.full((2, 3), 5.0), least=5.0, most=5.0, rows="r", columns="c", labels=[1, 2, 3]))
    assert len(constant.cells("m")) == 6
    many = chart("t", {f"layer {i}": ([1, 2], [i, i + 1]) for i in range(40)}, x="x", y="y")
    assert len({found["stroke"] for tag, found in Page(many).elements if tag == "polyline"}) == 40


def test_the_command_writes_the_page_and_gives_the_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(folder / "run", tmp_path)
    assert command("report", run) == command("report", run) == 0  # again and again into the same file
    assert capsys.readouterr().out.splitlines() == [f"wrote {run / 'report.html'}: 4 lines of metrics"] * 2
    assert command("report", run, "--out", tmp_path / "page.html", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lines"] == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["figures"]["steps"] == 8
    assert np.array(found["gates"]["layers"][1]["cosine"]).shape == (8, 8)
    assert (tmp_path / "page.html").is_file()
    assert command("report", run, "--out", tmp_path / "page.html") == 2
    assert "page.html exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert command("report", tmp_path) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path} is no run folder (no run.toml, no metrics.jsonl); name the output.folder of a run\n"
    )
