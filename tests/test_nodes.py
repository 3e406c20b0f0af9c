"""launch/nodes.sh: emulated nodes over links of a real bandwidth, and what is left of them; needs root and iproute2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ep_engine.checkpoint import read_manifest
from ep_engine.config import RunConfig, load_config, to_toml
from tests.distributed import run_ranks
from tests.run_cases import losses, moe_model, small_run, train_here, write_text

ROOT = Path(__file__).parents[1]
NODES = str(ROOT / "launch" / "nodes.sh")
PARTS = """ip link add type veth && ip link add type bridge &&
  tc qdisc add dev veth0 root tbf rate 1mbit burst 32kb latency 5ms"""


def why_not() -> str | None:
    """Why there can be no nodes here; None where there can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"there is no {missing[0]} on PATH (Debian: apt install iproute2)"
    namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "bash", "-c", PARTS]
    made = subprocess.run(namespaces, capture_output=True, text=True, check=False)
    return f"namespaces, veth, bridge or tbf cannot be had here ({made.stderr.strip()})" if made.returncode else None


WHY_NOT = why_not()
needs_nodes = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def environment(**more: str) -> dict[str, str]:
    """Of a script: this interpreter, and one thread per rank, so that runs can be compared bit by bit."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "EP_PYTHON": sys.executable, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def launch(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a hang fails the test."""
    line = [str(part) for part in command]
    return subprocess.run(line, env=environment(**more), capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "2",
        "2 true",
        "2 --bandwidth 100mbit",
        "2 --bandwidth",
        "2 --bandwidth fast true",
        "2 --bandwidth 100 true",
        "0 --bandwidth 100mbit true",
        "100 --bandwidth 100mbit true",
        "2 --bandwidth 100mbit --ranks-per-node 0 true",
        "2 --bandwidth 100mbit --max-restarts -1 true",
        "2 --bandwidth 100mbit --latency 5ms true",
    ],
)
def test_a_command_line_that_is_not_understood_is_one_sentence(arguments: str) -> None:
    done = launch(NODES, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"usage: .*nodes\.sh N --bandwidth 100mbit .* COMMAND\.\.\., with 1 to 99 nodes, .*\n", done.stderr
    )


@needs_nodes
def test_a_run_that_cannot_start_is_refused_before_there_is_a_network(run: RunConfig) -> None:
    run_file = run.output.folder.with_suffix(".toml")
    done = launch(NODES, 2, "--bandwidth", "100mbit", "ep-engine", "train", run_file, "parallel.expert_parallel_size=3")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("parallel.expert_parallel_size (3) must divide the 2 ranks")


# What is left


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[str]
    namespaces: set[str]  # of the ranks' network


@contextmanager
def sleeping_nodes(seconds: str) -> Iterator[Started]:
    """Two nodes whose ranks sleep, when all of them do."""
    command = [NODES, "2", "--bandwidth", "100mbit", "sleep", seconds]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def heed() -> None:  # under nohup SIGHUP is ignored, and a shell cannot heed what it was started deaf to
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        command, env=environment(), text=True, start_new_session=True, preexec_fn=heed, **pipes
    ) as process:
        try:
            yield Started(process, {os.readlink(f"/proc/{pid}/ns/net") for pid in wait_for(["sleep", seconds], 2)})
        finally:
            process.kill()


def processes(arguments: list[str]) -> list[int]:
    """Of this machine, in any namespace, with this command line or part of one."""
    found = []
    wanted = "\0".join(arguments)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "cmdline").read_text() and folder.name != str(os.getpid()):
                found.append(int(folder.name))
        except (OSError, UnicodeDecodeError):  # gone meanwhile
            continue
    return found


def wait_for(arguments: list[str], count: int) -> list[int]:
    """The processes whose whole command line this is, once there are so many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [
            pid for pid in processes(arguments) if Path(f"/proc/{pid}/cmdline").read_text().startswith(arguments[0])
        ]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{arguments} was not started {count} times")


def assert_nothing_is_left(namespaces: set[str], marks: list[str]) -> None:
    """No name of an interface or a namespace, no process, and no namespace without a name."""
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r": (switch|port\d+)", links)
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == ""
    assert "netns" not in {line.split()[0] for line in Path("/proc/mounts").read_text().splitlines()}
    deadline = time.monotonic() + 20  # the kernel ends what a killed first process leaves behind, but not at once
    while (processes(marks) or held_namespaces() & namespaces) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(marks) == []
    assert not held_namespaces() & namespaces


def held_namespaces() -> set[str]:
    """Of the network, of all processes."""
    held = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            held.add(os.readlink(link))
        except OSError:
            continue
    return held


@needs_nodes
@pytest.mark.parametrize(
    ("ending", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143), (signal.SIGKILL, -9)]
)
def test_a_signal_ends_all_nodes_and_leaves_nothing(ending: signal.Signals, status: int) -> None:
    seconds = f"{600 + os.getpid() / 1e7 + ending / 1e9:.9f}"  # by which these are found
    with sleeping_nodes(seconds) as started:
        assert len(started.namespaces) == 2
        assert os.readlink("/proc/self/ns/net") not in started.namespaces
        assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == ""
        started.process.send_signal(ending)
        assert started.process.wait(timeout=20) == status
        assert_nothing_is_left(started.namespaces, ["sleep", seconds])


@needs_nodes
def test_every_node_is_heard_and_the_end_is_that_of_the_command() -> None:
    words = (
        'echo "rank $RANK of $WORLD_SIZE on node $GROUP_RANK at $(ip -4 -oneline address show eth0 | grep -c 10.0.0.)"'
    )
    done = launch(NODES, 3, "--bandwidth", "100mbit", "bash", "-c", words)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {node} of 3 on node {node} at 1" for node in range(3)]
    assert re.search(
        r"^goodput over links of 100mbit in \d+ s: bytes that passed, headers included$", done.stderr, re.M
    )
    assert (
        len(
            re.findall(
                r"^node \d: sent \d+ kB \(\d+ Mbit/s on average, \d+ in the busiest second\), ", done.stderr, re.M
            )
        )
        == 3
    )
    assert_nothing_is_left(set(), ["switch.sh", "3", "100mbit"])


@needs_nodes
@pytest.mark.slow
def test_a_node_that_fails_takes_along_one_that_hangs() -> None:
    started = time.monotonic()
    done = launch(NODES, 2, "--bandwidth", "100mbit", "bash", "-c", "((RANK)) && exit 3 || sleep 601.5")
    assert done.returncode == 1
    assert time.monotonic() - started < 120
    assert "node 1: torchrun ended with status 1\nnodes 0 still ran and were stopped\n" in done.stderr
    assert_nothing_is_left(set(), ["sleep", "601.5"])


@needs_nodes
@pytest.mark.slow
def test_a_node_that_does_not_come_is_a_sentence_after_a_time() -> None:
    command = [NODES, "2", "--bandwidth", "100mbit", "sleep", "602.5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment(EP_JOIN_SECONDS="5"), text=True, **pipes) as process:
        try:
            agent = wait_for_agent("10.0.0.102", "602.5")
            os.kill(agent, signal.SIGSTOP)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "the nodes did not meet (RendezvousTimeoutError): not all nodes came in time" in out
    assert "nodes 1 still ran and were stopped" in out


def wait_for_agent(address: str, mark: str) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in processes(["--local-addr", address]):
            if mark in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        time.sleep(0.01)
    raise AssertionError(f"there is no torchrun at {address}")


# What passes


@needs_nodes
@pytest.mark.slow
def test_links_have_their_bandwidth_and_the_ledger_counts_what_passes_them(tmp_path: Path) -> None:
    found_at = tmp_path / "found.json"
    done = launch(NODES, 2, "--bandwidth", "100mbit", "--ranks-per-node", 2, "-m", "tests.over_nodes", found_at)
    assert done.returncode == 0, done.stderr
    assert "transport of the experts: hierarchical (several nodes)" in done.stderr
    found = json.loads(found_at.read_text())
    assert found["nodes"] == [0, 0, 1, 1]
    least = (4_000_000 - 2 * 32_000) * 8 / 100e6  # both ends of a link let one burst pass at once
    assert found["one_way_s"] >= least
    assert found["both_ways_s"] >= least
    for node in range(2):
        ranks = [rank for rank in range(4) if found["nodes"][rank] == node]
        payload = sum(found["exchange"][rank][0] for rank in ranks)
        on_the_wire = found["exchange"][ranks[0]][1]
        # Beside the payload: 66 bytes of Ethernet, IP and TCP headers for every 1448, acknowledgements, and in the
        # constant what an exchange says before (counts, gloo's own headers) and two barriers.
        assert payload < on_the_wire < 1.08 * payload + 100_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text(tmp_path_factory.mktemp("runs"))
    moe_model(folder)
    return folder


def write_run(files: Path, name: str, ep_size: int) -> RunConfig:
    """A run of 6 steps that saves every 2, and its file beside its folder."""
    config = small_run(
        files,
        name,
        model={"checkpoint": str(files / "moe")},
        train={"steps": 6, "save_every": 2},
        parallel={"expert_parallel_size": ep_size, "device": "cpu"},
        output={"async_save": False},  # who is killed after a save has left a whole one
    )
    path = config.output.folder.with_suffix(".toml")
    path.write_text(to_toml(config))
    return load_config(path)


@pytest.fixture
def run(files: Path, request: pytest.FixtureRequest) -> RunConfig:
    return write_run(files, re.sub(r"\W+", "-", request.node.name), 4)


TWO_BY_TWO = (NODES, 2, "--bandwidth", "100mbit", "--ranks-per-node", 2)


@pytest.fixture(scope="module")
def undisturbed(files: Path) -> tuple[RunConfig, str]:
    """A run on two nodes of two ranks, and what it said."""
    config = write_run(files, "undisturbed", 4)
    done = launch(*TWO_BY_TWO, "ep-engine", "train", files / "undisturbed.toml")
    assert done.returncode == 0, done.stderr
    return config, done.stderr


@needs_nodes
@pytest.mark.slow
def test_training_over_nodes_gives_the_losses_of_one_process(files: Path, undisturbed: tuple[RunConfig, str]) -> None:
    config, said = undisturbed
    assert said.count("transport of the experts: hierarchical (several nodes)\n") == 1
    single = write_run(files, "single", 1)
    train_here(single)
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)
    layers = json.loads((config.output.folder / "summary.json").read_text())["ledger"]["layers"]
    counted = sum(tiers["network"] for layer in layers for tiers in layer["bytes"].values())
    passed = sum(int(kilobytes) for kilobytes in re.findall(r"^node \d: sent (\d+) kB", said, re.M)) * 1000
    assert 0 < counted < passed  # the dense gradients and weights go the same way


# What dies


def assert_same_run(found: RunConfig, expected: RunConfig) -> None:
    assert losses(found) == losses(expected)
    sums = [read_manifest(c.output.folder / "checkpoints" / "step_000006")["checksums"] for c in (found, expected)]
    assert sums[0] == sums[1]


def dying(who: str, rank: int, steps: int, run: RunConfig) -> dict[str, str]:
    died = run.output.folder.with_suffix(".died")
    return {"DIES": who, "DIES_ON": str(rank), "DIES_AFTER": str(steps), "DIED": str(died)}


@needs_nodes
@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "torchrun"])
def test_a_killed_rank_or_node_goes_on_from_the_last_checkpoint(
    who: str, run: RunConfig, undisturbed: tuple[RunConfig, str]
) -> None:
    command = ("-m", "tests.dying_run", "train", run.output.folder.with_suffix(".toml"))
    done = launch(*TWO_BY_TWO, "--max-restarts", 2, *command, **dying(who, 3, 5, run))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the ranks of this job were started again; going on from ") == 1
    assert ("node 1: started again (1 of 2)\n" in done.stderr) == (who == "torchrun")
    assert (run.output.folder / "run.from-4.toml").exists()
    assert_same_run(run, undisturbed[0])


@needs_nodes
@pytest.mark.slow
def test_the_first_node_is_not_replaced(run: RunConfig) -> None:
    command = ("-m", "tests.dying_run", "train", run.output.folder.with_suffix(".toml"))
    done = launch(*TWO_BY_TWO, "--max-restarts", 2, *command, **dying("torchrun", 0, 3, run))
    assert done.returncode == 137
    assert "node 0: torchrun ended with status 137\n" in done.stderr
    assert [path.name for path in (run.output.folder / "checkpoints").iterdir()] == ["step_000002"]


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "said"), [(5, "going on from "), (1, "there is no checkpoint yet, beginning again\n")]
)
def test_ranks_of_one_machine_that_are_started_again_end_the_same(steps: int, said: str, files: Path) -> None:
    run, expected = (write_run(files, f"{name}-{steps}", 2) for name in ("killed", "whole"))
    run_ranks(_train, expected)
    command = ("-m", "tests.dying_run", "train", run.output.folder.with_suffix(".toml"))
    torchrun = (sys.executable, "-P", ROOT / "launch" / "torchrun.py", "--standalone", "--nproc-per-node", 2)
    done = launch(*torchrun, "--max-restarts", 1, *command, **dying("rank", 1, steps, run), GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    assert f"the ranks of this job were started again; {said}" in done.stderr
    assert_same_run(run, expected)
