"""Refuse, in one sentence, an interpreter that lacks what this checkout needs: check_python.py runtime|dev."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

BUILD_TOOLS = ["setuptools", "pybind11"]
TEST_TOOLS = ["pytest", "hypothesis"]


def unmet(requirements: list[str]) -> list[str]:
    """The requirements that this interpreter does not meet."""
    name_of = {requirement: re.split(r"[<>=]", requirement)[0] for requirement in requirements}
    installed: dict[str, str] = {}
    for package in metadata.distributions():  # in the order of the path: the first of a name counts
        if package.name:  # an interrupted removal leaves a folder without one
            installed.setdefault(package.name.lower().replace("_", "-"), package.version)
    missing = [requirement for requirement, name in name_of.items() if name not in installed]
    if missing:
        return missing
    from packaging.specifiers import SpecifierSet  # comes with what is now known to be there
    from packaging.version import Version

    outside = []
    for requirement, name in name_of.items():
        # Vendors ship 2.11.0a0+their.build; its base is what counts.
        base = Version(installed[name]).base_version
        if not SpecifierSet(requirement.removeprefix(name)).contains(base):
            outside.append(f"{requirement} (it has {installed[name]})")
    return outside


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    tools = BUILD_TOOLS + (TEST_TOOLS if sys.argv[1] == "dev" else [])
    lacks = unmet(project["dependencies"] + tools)
    if lacks:
        sys.exit(f"EP_PYTHON ({sys.executable}) lacks {', '.join(lacks)}; install that there, or unset EP_PYTHON")


if __name__ == "__main__":
    main()
