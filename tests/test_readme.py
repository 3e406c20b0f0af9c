"""The README is true: its table is the configuration's, and the files and commands it names are there."""

import json
import re
from pathlib import Path

import pytest

from ep_engine.cli import app
from ep_engine.config import config_table
from ep_engine.reports.report import table_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_configuration_table_is_that_of_the_code() -> None:
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in config_table()]
    found = [line for line in README.splitlines() if re.match(r"\| `\w+\.\w+` \|", line)]
    assert found == rows


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:\./)?(launch/[\w/.]+\.(?:sh|toml))", README))))
def test_scripts_and_examples_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()


def test_commands_are_known() -> None:
    known = {command.name for command in app.registered_commands}
    assert set(re.findall(r"ep-engine (\w+)", README)) <= known


def test_the_table_is_that_of_the_measured_run() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())["arms"]
    for row in table_rows(arms):
        assert f"| {' | '.join(row)} |" in README


def test_the_first_screen_has_the_two_commands_and_a_measured_table() -> None:
    screen = "\n".join(README.splitlines()[:25])
    assert "./launch/quickstart.sh" in screen
    assert "./launch/test.sh" in screen
    assert re.search(r"\| c2r_grouped \|", screen)
