"""The report of a run in headless Chromium, which cannot reach any network: its numbers, its colours, a screenshot.

Chromium is Debian's package of that name, which .ci/run installs; it is driven by its own options alone. What it drew
is asked with a script that the test adds to a copy of the page, for the page itself runs none.
"""

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ep_engine.reports.run_numbers import read_run
from ep_engine.reports.run_report import write_run_report
from tests.run_cases import moe_folder, small_run, train_here
from tests.test_run_report import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on PATH; it is a package of Debian, which .ci/run installs"
)

SIZE = (1200, 5000)
SCREENSHOT = Path(__file__).parents[1] / "build" / "run-report.png"
HOT_LAYER, HOT_EXPERT, HOT_LINE = 1, 5, 3
# No name is found, and every connection, to this machine too, goes to a proxy that is not there.
NO_NETWORK = ("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>")
PROBE = """<script>
for (const one of document.querySelectorAll('.cells rect')) {
  const box = one.getBoundingClientRect();
  one.dataset.at = JSON.stringify([box.x + box.width / 2 + scrollX, box.y + box.height / 2 + scrollY]);
  one.dataset.shade = getComputedStyle(one).fill;
}
</script>"""


def browse(page: Path, *options: str, profile: Path) -> str:
    """What Chromium prints of a page."""
    assert CHROMIUM is not None
    found = subprocess.run(
        [
            *(
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--force-device-scale-factor=1",
            ),
            *(f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout


def dom(page: Path, profile: Path, *network: str) -> Page:
    return Page(browse(page, "--dump-dom", *network, profile=profile))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts, in whose metrics one expert is hot for a while."""
    folder = moe_folder(tmp_path_factory.mktemp("runs"))
    train_here(small_run(folder, "run", model={"checkpoint": str(folder / "moe")}, train={"steps": 12}))
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    load = lines[HOT_LINE]["layers"][HOT_LAYER]["load"]
    load[HOT_EXPERT] += 3 * max(load)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run_report(folder / "page.html", read_run(folder / "run"))
    return folder


def darkness(shade: str) -> float:
    """Of rgb(r, g, b): 0 is white."""
    red, green, blue = (int(part) for part in shade.removeprefix("rgb(").removesuffix(")").split(","))
    return 255 - (0.2126 * red + 0.7152 * green + 0.0722 * blue)


def test_the_numbers_in_the_browser_are_those_of_the_file(run: Path, tmp_path: Path) -> None:
    page = dom(run / "page.html", tmp_path, *NO_NETWORK)
    lines = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for title, name, key in (
        ("Loss over steps", "training", "loss"),
        ("Gradient norm", "norm", "grad_norm"),
        ("MFU", "MFU", "mfu"),
    ):
        assert page.curve(title, name) == [(line["step"], line[key]) for line in lines]
    for layer in (0, 1):
        loads = np.array([line["layers"][layer]["load"] for line in lines]).T
        shown = [float(cell["data-value"]) for cell in page.cells(f"Load, layer {layer}")]
        np.testing.assert_allclose(shown, (loads / loads.mean(axis=0)).ravel(), rtol=1e-5)  # six digits are written
        violation = [line["layers"][layer]["max_violation"] for line in lines]
        found = page.curve("Largest violation: the busiest expert over the mean, minus 1", f"layer {layer}")
        assert [value for _, value in found] == violation


def test_the_hot_expert_has_the_strongest_colour(run: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text((run / "page.html").read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    page = dom(probed, tmp_path / "profile", *NO_NETWORK)
    SCREENSHOT.parent.mkdir(exist_ok=True)
    SCREENSHOT.unlink(missing_ok=True)
    browse(run / "page.html", f"--screenshot={SCREENSHOT}", *NO_NETWORK, profile=tmp_path / "profile")
    picture = Image.open(SCREENSHOT).convert("RGB")
    assert picture.size == SIZE
    asked: dict[tuple[int, int, int], float] = {}
    drawn: dict[tuple[int, int, int], float] = {}
    for layer in (0, 1):
        for cell in page.cells(f"Load, layer {layer}"):
            where = layer, int(cell["y"]), int(cell["x"])
            asked[where] = darkness(cell["data-shade"])
            x, y = json.loads(cell["data-at"])
            drawn[where] = darkness(f"rgb{picture.getpixel((int(x), int(y)))}")
    hot = HOT_LAYER, HOT_EXPERT, HOT_LINE
    for darkest in (asked, drawn):
        others = [value for where, value in darkest.items() if where != hot]
        assert darkest[hot] > max(others) + 20
    assert drawn == pytest.approx(asked, abs=2)  # cells are drawn where the browser says, in the colours that it says


def test_the_browser_of_these_tests_reaches_nothing(tmp_path: Path) -> None:
    """A page that asks for a picture gets it without our options, so that the tests would notice."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page = tmp_path / "page.html"
        page.write_text(f"<!doctype html><img src='http://127.0.0.1:{server.server_port}/picture.png'>")
        dom(page, tmp_path / "one", *NO_NETWORK)
        assert asked == []
        dom(page, tmp_path / "two")
        assert "/picture.png" in asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
