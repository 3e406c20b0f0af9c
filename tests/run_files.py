"""A folder with everything that commands read, the run file of a small run of it, and what a folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.convert import convert
from ep_engine.config import load_config, to_toml
from ep_engine.placement import Placement
from ep_engine.resolve import Run, resolve
from tests.counts import random_profile
from tests.run_cases import moe_model, small_run, write_text


def make_files(folder: Path) -> Path:
    """Token files, checkpoints `dense-engine` and `moe` (2 layers, 8 experts, top-2), its profile and placements."""
    write_text(folder)
    moe_model(folder)
    convert(folder / "dense", folder / "dense-engine")
    random_profile(2, 8, seed=0).save(folder / "profile.npz")
    for devices in (2, 4, 8):
        Placement.contiguous(8, devices, 2).save(folder / f"placement{devices}.json")
    return folder


def write_run(files: Path, folder: Path, model: Mapping[str, Any] | None = None) -> Path:
    """`folder/run.toml`: a small run into `folder/run`, of the checkpoint `moe` or of a new model of these sizes."""
    model = model or {"checkpoint": str(files / "moe")}
    path = folder / "run.toml"
    sections = {"parallel": {"device": "cpu"}, "output": {"folder": str(folder / "run")}}
    path.write_text(to_toml(small_run(files, "", model=dict(model), **sections)))
    return path


def drop_key(run_file: Path, key: str) -> None:
    """Take a key out of a run file."""
    lines = run_file.read_text().splitlines(keepends=True)
    run_file.write_text("".join(line for line in lines if not line.startswith(f"{key} = ")))


def resolve_run(
    files: Path,
    folder: Path,
    *overrides: str,
    world_size: int = 1,
    ranks_per_node: int | None = None,
    overwrite: bool = False,
    model: Mapping[str, Any] | None = None,
) -> Run:
    """Resolve that run with overrides, in which {files} and {out} stand for the two folders."""
    given = [override.format(files=files, out=folder) for override in overrides]
    config = load_config(write_run(files, folder, model), given)
    return resolve(config, world_size, ranks_per_node=ranks_per_node, overwrite=overwrite)


def contents(*folders: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes and every folder, to compare what stood before with what stands after."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: None if path.is_dir() else path.read_bytes() for path in paths}
