"""The launch scripts in a copy of the checkout, with a stand-in for Python that notes what it is asked to do."""

import shutil
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import packaging
import pytest

from ep_engine.config import load_config

ROOT = Path(__file__).parents[1]
TOOLS = (
    "bash", "cat", "chmod", "cp", "cut", "dirname", "env", "find", "flock", "grep", "mkdir", "nproc", "rm", "sha256sum",
    "sleep", "sort", "touch", "xargs",
)  # fmt: skip

# Agrees to all questions about itself; installing and building leave what the scripts look for.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$HOME/calls"
case "$*" in
  *"-m venv --clear"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *"-m pip"*) sleep "${PIP_SECONDS:-0}"; [[ -z ${PIP_FAILS:-} ]] || { echo "no route to host"; exit 1; } ;;&
  *--editable* | *build_ext*) mkdir -p ep_engine && touch ep_engine/ops.so ;;
  *distributions*) [[ ! -e $HOME/cut_off ]] ;;
  *"-m ep_engine.cli"*) echo "ran $PWD ${*: -2}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts read, beside a PATH of the tools they use, a C++ compiler and python3.11."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, root)
    (root / "setup.py").touch()
    (root / "csrc").mkdir()
    (root / "csrc" / "op.cpp").write_text("one")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in TOOLS:
        (bin_folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"there is no {tool} here"))
    for name in ("c++", "python3.11"):
        (bin_folder / name).write_text(STAND_IN)
        (bin_folder / name).chmod(0o755)
    return root


def script(checkout: Path, name: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "launch" / name, *args],
        env={"PATH": str(checkout.parent / "bin"), "HOME": str(checkout.parent), **environment},
        cwd=checkout.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def installed(checkout: Path) -> list[str]:
    """What was asked of pip and setup.py since the last time this was called."""
    calls = checkout.parent / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    asked = [line.split("--no-input install ")[-1] for line in lines if "-m pip" in line or "build_ext" in line]
    return [line.replace(f"{checkout}", "ROOT") for line in asked]


RUNTIME = [
    next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")),
    "-r ROOT/requirements.txt",
    "--no-deps --no-build-isolation --editable ROOT",
]


def test_the_first_run_installs_torch_before_the_rest_and_the_second_nothing(checkout: Path) -> None:
    first = script(checkout, "quickstart.sh", "--out", "x")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"ran {checkout.parent} --out x\n"
    assert first.stderr.splitlines() == [
        "making .venv with python3.11 ...",
        "installing torch ...",
        "installing pinned packages ...",
        "installing ep_engine, building csrc ...",
        "loading csrc ...",
    ]
    assert installed(checkout) == RUNTIME

    second = script(checkout, "quickstart.sh", "--out", "x")
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert installed(checkout) == []


def test_a_changed_pin_is_installed_and_a_changed_op_only_built(checkout: Path) -> None:
    script(checkout, "quickstart.sh")
    installed(checkout)

    with (checkout / "requirements.txt").open("a") as pins:
        pins.write("another==1\n")
    assert "making .venv" not in script(checkout, "quickstart.sh").stderr
    assert installed(checkout) == RUNTIME

    (checkout / "csrc" / "op.cpp").write_text("two")
    assert script(checkout, "quickstart.sh").stderr.splitlines() == ["building csrc ...", "loading csrc ..."]
    assert installed(checkout) == ["setup.py build_ext --inplace"]


def test_tests_add_their_packages_and_quickstart_keeps_them(checkout: Path) -> None:
    script(checkout, "quickstart.sh")
    installed(checkout)
    script(checkout, "test.sh")
    assert "-r ROOT/requirements-dev.txt" in installed(checkout)
    script(checkout, "quickstart.sh")
    assert installed(checkout) == []


def test_a_failed_installation_is_shown_and_tried_again(checkout: Path) -> None:
    failed = script(checkout, "quickstart.sh", PIP_FAILS="1")
    assert failed.returncode == 1
    assert failed.stderr.endswith("no route to host\ninstalling torch failed: the output is above\n")
    installed(checkout)
    assert script(checkout, "quickstart.sh").returncode == 0
    assert installed(checkout) == RUNTIME


@pytest.mark.parametrize("how", ["python is gone", "a package was cut off"])
def test_a_broken_environment_is_made_again(checkout: Path, how: str) -> None:
    script(checkout, "quickstart.sh")
    if how == "python is gone":
        (checkout / ".venv" / "bin" / "python").unlink()
    else:
        (checkout / ".venv" / ".pins").unlink()
        (checkout.parent / "cut_off").touch()
    assert "making .venv" in script(checkout, "quickstart.sh").stderr


def test_two_scripts_at_once_install_once(checkout: Path) -> None:
    environment = {"PATH": str(checkout.parent / "bin"), "HOME": str(checkout.parent), "PIP_SECONDS": "0.1"}
    command = [checkout / "launch" / "quickstart.sh"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert installed(checkout) == RUNTIME
    assert "waiting for another script that prepares this checkout ...\n" in errors


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("c++", "there is no C++ compiler (c++) on PATH"),
        ("python3.11", "there is no Python 3.11 or 3.12 with its venv module on PATH"),
        ("flock", "there is no flock on PATH"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(checkout: Path, missing: str, sentence: str) -> None:
    (checkout.parent / "bin" / missing).unlink()
    assert_refused(script(checkout, "quickstart.sh"), sentence)
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("versions", "lack"),
    [
        ({}, "lacks torch>=2.11,<2.14, numpy>=1.26"),
        ({"torch": "2.10.1"}, "lacks torch>=2.11,<2.14 (it has 2.10.1); install that there, or unset EP_PYTHON"),
        ({"torch": "2.14.0.dev1"}, "lacks torch>=2.11,<2.14 (it has 2.14.0.dev1)"),
        ({"torch": "2.11.0a0+vendor", "numpy": "1.0"}, "lacks numpy>=1.26 (it has 1.0)"),
        ({"torch": "2.11.0+cu130", "pytest": None}, "lacks pytest;"),
    ],
)
def test_an_environment_that_lacks_a_package_is_refused(
    checkout: Path, versions: dict[str, str | None], lack: str
) -> None:
    """`versions` over what runs this test; none at all stands for a bare interpreter."""
    own = checkout.parent / "own_environment"
    venv.create(own, with_pip=False, symlinks=True)
    if versions:
        site = next(own.glob("lib/python*/site-packages"))
        (site / "packaging").symlink_to(Path(packaging.__file__).parent)
        for package in metadata.distributions():
            version = versions.get(package.name, package.version)
            if version:
                folder = site / f"{package.name}-{version}.dist-info"
                folder.mkdir(exist_ok=True)
                (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {version}\n")

    result = script(checkout, "test.sh", EP_PYTHON="own_environment/bin/python")

    assert_refused(result, f"EP_PYTHON ({own}/bin/python) {lack}")
    assert not (checkout / ".venv").exists()


def test_an_environment_that_fits_is_used_and_not_installed_into(checkout: Path) -> None:
    (checkout.parent / "bin" / "own").write_text(
        STAND_IN.replace('case "$*" in', 'case "$*" in\n  *%d.%d*) echo 3.12 ;;')
    )
    (checkout.parent / "bin" / "own").chmod(0o755)
    result = script(checkout, "quickstart.sh", "--out", "x", EP_PYTHON="own")
    assert result.stdout == f"ran {checkout.parent} --out x\n"
    assert installed(checkout) == ["setup.py build_ext --inplace"]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("echo 3.10", "EP_PYTHON (own) is Python 3.10; set it to a Python 3.11 or 3.12, or unset it"),
        ("echo 3.13", "EP_PYTHON (own) is Python 3.13; set it to a Python 3.11 or 3.12, or unset it"),
        ("exit 127", "EP_PYTHON (own) does not run as a Python; set it to a Python 3.11 or 3.12, or unset it"),
        (None, "EP_PYTHON (own) is not a program; set it to a Python 3.11 or 3.12, or unset it"),
    ],
)
def test_an_interpreter_that_does_not_fit_is_refused(checkout: Path, says: str | None, sentence: str) -> None:
    if says:
        (checkout.parent / "bin" / "own").write_text(f"#!/usr/bin/env bash\n{says}\n")
        (checkout.parent / "bin" / "own").chmod(0o755)
    assert_refused(script(checkout, "quickstart.sh", EP_PYTHON="own"), sentence)


@pytest.mark.parametrize(
    "args", ["", "2", "two run.toml", "0 run.toml", "2 --max-restarts 1", "2 --max-restarts x run.toml"]
)
def test_local_asks_for_a_number_of_ranks_and_a_run(checkout: Path, args: str) -> None:
    assert_refused(script(checkout, "local.sh", *args.split()), "N [--max-restarts K] RUN.toml")


def test_local_checks_the_run_in_one_process_and_then_starts_the_ranks(checkout: Path) -> None:
    result = script(checkout, "local.sh", "2", "run.toml", "train.steps=3")
    assert result.stdout.splitlines() == [f"ran {checkout.parent} run.toml train.steps=3"] * 2
    calls = [line for line in (checkout.parent / "calls").read_text().splitlines() if "ep_engine.cli train" in line]
    assert calls == [
        "-P -m ep_engine.cli train --check-for 2 run.toml train.steps=3",
        f"-P {checkout}/launch/torchrun.py --standalone --nproc-per-node 2 --max-restarts 0 -m ep_engine.cli train "
        "run.toml train.steps=3",
    ]


def test_local_passes_on_how_often_to_start_again(checkout: Path) -> None:
    assert script(checkout, "local.sh", "2", "--max-restarts", "3", "run.toml").returncode == 0
    assert " --max-restarts 3 -m ep_engine.cli train run.toml\n" in (checkout.parent / "calls").read_text()


@pytest.fixture
def able(checkout: Path) -> Path:
    """A checkout beside stand-ins for what makes nodes; `setpriv` notes what would live in the new namespaces."""
    for name in ("ip", "tc", "unshare", "setpriv"):
        path = checkout.parent / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$HOME/calls"\n')
        path.chmod(0o755)
    return checkout


def test_nodes_says_which_tool_is_missing(able: Path) -> None:
    (able.parent / "bin" / "tc").unlink()
    assert_refused(script(able, "nodes.sh", *NODES, "true"), "there is no tc on PATH; install it")


def test_nodes_says_that_it_needs_rights(able: Path) -> None:
    (able.parent / "bin" / "unshare").write_text("#!/usr/bin/env bash\necho denied >&2\nexit 1\n")
    assert_refused(script(able, "nodes.sh", *NODES, "true"), "run this as root (in a container: with CAP_SYS_ADMIN")
    assert not (able / ".venv").exists()


NODES = ("2", "--bandwidth", "1gbit", "--ranks-per-node", "3", "--max-restarts", "4")
OF_CHECK = "-P -m ep_engine.cli train --check-for 6 --ranks-per-node 3 run.toml a.b=1"


@pytest.mark.parametrize(
    ("command", "started", "checked"),
    [
        ("ep-engine train run.toml a.b=1", "-m ep_engine.cli train run.toml a.b=1", [OF_CHECK]),
        ("-m ep_engine.cli train run.toml a.b=1", "-m ep_engine.cli train run.toml a.b=1", [OF_CHECK]),
        ("-m some.module x", "-m some.module x", []),
        ("some/script.py x", "some/script.py x", []),
        ("program --flag", "--no-python program --flag", []),
    ],
)
def test_nodes_starts_the_command_in_namespaces_of_its_own(
    able: Path, command: str, started: str, checked: list[str]
) -> None:
    assert script(able, "nodes.sh", *NODES, *command.split()).returncode == 0
    calls = (able.parent / "calls").read_text().splitlines()
    assert [line for line in calls if "--check-for" in line] == checked
    assert calls[-1].startswith(
        "setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc "
    )
    assert calls[-1].endswith(f"{able}/launch/switch.sh 2 1gbit 4 --nproc-per-node 3 {started}")


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_is_a_run(path: Path) -> None:
    config = load_config(path)
    assert config.output.folder == Path("runs") / path.stem.removesuffix("_cpu")


def assert_refused(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
