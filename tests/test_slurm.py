"""launch/slurm.sbatch with stand-ins for srun and scontrol: what it starts, and a job that is requeued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ep_engine.checkpoint import read_manifest
from ep_engine.config import RunConfig, to_toml
from tests.distributed import run_ranks
from tests.run_cases import losses, small_run, train_here
from tests.run_files import make_files

ROOT = Path(__file__).parents[1]
# Both nodes are this machine.
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames two[1-2]" ]] && printf 'localhost\\nlocalhost\\n'
"""
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$SRUN_CALLS"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURMD_NODENAME=localhost "$@" & done
wait -n && wait -n
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes."""
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": "4711", "SUBMIT_DIR": str(ROOT), "NNODES": "2", "JOB_NODELIST": "two[1-2]", "CPUS_ON_NODE": "1"}
    return {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SRUN_CALLS": str(tmp_path / "calls"),
        "EP_PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def line(folder: Path, *arguments: object) -> list[str]:
    """What Slurm runs: a copy of the script that lies elsewhere."""
    copy = folder / "slurm_script"
    copy.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
    return ["bash", str(copy), *map(str, arguments)]


def sbatch(job: dict[str, str], folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    return subprocess.run(
        line(folder, *arguments), env=job, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )


def test_it_asks_for_a_job_and_a_run(job: dict[str, str], tmp_path: Path) -> None:
    outside = {name: value for name, value in job.items() if name != "SLURM_JOB_ID"}
    for done in (sbatch(job, tmp_path), sbatch(outside, tmp_path, "run.toml")):
        assert done.returncode == 2
        assert done.stderr == "usage: sbatch [--nodes N ...] launch/slurm.sbatch RUN.toml [section.key=value ...]\n"


def test_it_asks_to_be_submitted_from_the_checkout(job: dict[str, str], tmp_path: Path) -> None:
    done = sbatch({**job, "SLURM_SUBMIT_DIR": str(tmp_path)}, tmp_path, "run.toml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no launch/environment.sh in " in done.stderr


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.mark.slow
def test_a_requeued_job_goes_on_and_ends_the_same(job: dict[str, str], tmp_path: Path) -> None:
    make_files(tmp_path)
    sections = {"train": {"steps": 20, "save_every": 4}, "parallel": {"expert_parallel_size": 2, "device": "cpu"}}
    lost, whole = (
        small_run(tmp_path, name, model={"checkpoint": str(tmp_path / "moe")}, **sections) for name in ("lost", "whole")
    )
    run_ranks(_train, whole)
    run_file = tmp_path / "run.toml"
    run_file.write_text(to_toml(lost))

    refused = sbatch(job, tmp_path, run_file, "parallel.expert_parallel_size=3")
    assert refused.returncode == 2
    assert "must divide the 2 ranks" in refused.stderr.splitlines()[-1]

    with subprocess.Popen(line(tmp_path, run_file), env=job, cwd=tmp_path, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not (lost.output.folder / "checkpoints" / "step_000004").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # as Slurm does when a node is lost
    for pid in ranks_of("4711"):
        os.kill(pid, signal.SIGKILL)
    assert not (lost.output.folder / "summary.json").exists()

    requeued = sbatch(job, tmp_path, run_file)
    assert requeued.returncode == 0, requeued.stderr
    assert "the ranks of this job were started again; going on from " in requeued.stderr
    assert losses(lost) == losses(whole)
    sums = [read_manifest(c.output.folder / "checkpoints" / "step_000020")["checksums"] for c in (lost, whole)]
    assert sums[0] == sums[1]
    calls = (tmp_path / "calls").read_text()
    assert calls.startswith("--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 bash -c ")
    assert "--max-restarts 3 --rdzv-backend c10d --rdzv-endpoint localhost:24711 --rdzv-id 4711 " in calls


def ranks_of(job_id: str) -> list[int]:
    """Processes of the job that are left: torchrun's ranks have sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TORCHELASTIC_RUN_ID={job_id}\0" in (folder / "environ").read_text():
                found.append(int(folder.name))
        except (OSError, UnicodeDecodeError):
            continue
    return found
