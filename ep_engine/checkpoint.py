"""Checkpoints that do not know the layout that wrote them: logical names, one entry per expert, a checksum for each.

    FOLDER/model.json      ModelConfig
    FOLDER/weights/        torch.distributed.checkpoint: the entries of `expected_entries`, and optimiser moments
    FOLDER/manifest.json   checksum of every entry, the command that wrote it, training state (step, ...)
    FOLDER/tokenizer/      Hugging Face tokenizer files, carried along

What an entry is, and which part of it a rank holds, is in entries.py.
"""

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ep_engine import checksum
from ep_engine.entries import Shard
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig
from ep_engine.output import begin_folder, finish_folder, remove_folder, reported_disk_errors
from ep_engine.version import VERSION

FORMAT_VERSION = 1

T = TypeVar("T")


def checksums(entries: Mapping[str, Shard], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Checksum of every entry, the parts of all ranks of `group` added up."""
    mine = {
        name: checksum.checksum(shard.tensor, first=shard.first, pitch=shard.pitch)
        for name, shard in entries.items()
        if not shard.is_copy
    }
    if group is None:
        return mine
    parts: list[dict[str, int]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return {name: checksum.add(*(p[name] for p in parts if name in p)) for part in parts for name in part}


def save(
    folder: Path,
    config: ModelConfig,
    entries: Mapping[str, Shard],
    *,
    training: Mapping[str, Any] | None = None,
    source: Path | None = None,
    group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint; `folder` appears only when every rank has written its part.

    Args:
        entries: what this rank holds, from `module_entries`.
        training: JSON values kept with the weights (step, data position, ...).
        source: checkpoint or Hugging Face folder whose tokenizer files are carried along.
        group: the ranks that save together; None in a single process.
    """
    sums = checksums(entries, group)
    leader = group is None or dist.get_rank(group) == 0

    def write() -> None:
        _save_weights(draft / "weights", entries, group)
        if leader:
            save_words(draft, config, sums, training=training or {}, source=source)

    draft = _together(lambda: begin_folder(folder, overwrite=overwrite) if leader else folder, folder, group)
    try:
        _together(write, folder, group)
        _together(lambda: finish_folder(draft, folder) if leader else None, folder, group)
    finally:
        if leader:
            shutil.rmtree(draft, ignore_errors=True)


def _together(work: Callable[[], T], folder: Path, group: dist.ProcessGroup | None) -> T:
    """Do this rank's part of a save; returns what the first rank's gave. If any rank fails, all raise the same."""
    value: T | None = None
    error: Exception | None = None
    try:
        with reported_disk_errors(folder):
            value = work()
    except Exception as caught:
        error = _save_fault(folder, caught)
    if group is None:
        if error is not None:
            raise error
        return cast(T, value)
    outcomes: list[tuple[T, str | None]] = [None] * dist.get_world_size(group)  # type: ignore[list-item]  # filled next
    dist.all_gather_object(outcomes, (value, None if error is None else str(error)), group=group)
    for _, words in outcomes:
        if words is not None:
            raise Fault(words, everywhere=True) from error
    return outcomes[0][0]


def _save_fault(folder: Path, error: Exception) -> Exception:
    """The words of a rank's disk in a sentence."""
    if isinstance(error, (Fault, UserError)):
        return error
    return Fault(f"checkpoint {folder} was not written ({error}); the previous one is untouched")


def _save_weights(path: Path, entries: Mapping[str, Shard], group: dist.ProcessGroup | None) -> None:
    state = {name: shard.saved for name, shard in entries.items()}
    with _plain_words(group), without_crc():
        dcp.save(state, checkpoint_id=path, process_group=group, no_dist=group is None)


@contextmanager
def without_crc() -> Iterator[None]:
    """Let torch.save leave out its own checksum of every tensor, beside which ours takes no time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def _plain_words(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Make torch.distributed.checkpoint speak plainly.

    It wraps what went wrong on a rank in a BaseException, which `except Exception` lets through, and it warns about a
    single process even where `no_dist` asks for one.
    """
    try:
        with ExitStack() as quiet:
            if group is None:  # what is ignored is ignored in all threads: not where a thread saves
                quiet.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def save_words(
    folder: Path,
    config: ModelConfig,
    sums: Mapping[str, int],
    *,
    training: Mapping[str, Any],
    source: Path | None,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write all of a checkpoint but its weights; `made` is what the manifest says beside of how it came about."""
    (folder / "model.json").write_text(config.model_dump_json(indent=1))
    manifest = {
        "format_version": FORMAT_VERSION,
        "command": sys.argv,
        "version": VERSION,
        "torch": torch.__version__,
        **(made or {}),
        "training": dict(training),
        "checksums": {name: f"{value:016x}" for name, value in sorted(sums.items())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    tokenizer = tokenizer_folder(source)
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        for file in tokenizer.iterdir():
            if file.name.startswith(
                ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")
            ):
                shutil.copy(file, folder / "tokenizer" / file.name)


def tokenizer_folder(source: Path | None) -> Path | None:
    """Where a checkpoint or a Hugging Face folder keeps its tokenizer; None if it has none."""
    for folder in (source / "tokenizer", source) if source else ():
        if any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
            return folder
    return None


def hash_of_model(folder: Path) -> str:
    """sha256 over the checksums of all weights of a checkpoint."""
    sums = read_manifest(folder)["checksums"]
    return hash_of_checksums({name: int(value, 16) for name, value in sums.items() if "/" not in name})


def hash_of_checksums(sums: Mapping[str, int]) -> str:
    """sha256 over names and checksums."""
    weights = sorted(f"{name} {value:016x}" for name, value in sums.items())
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()


def newest(run_folder: Path) -> Path | None:
    """The checkpoint of most steps in a run folder; None if it holds none."""
    return next(reversed(_of_run(run_folder)), None)


def keep_newest(run_folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints of a run."""
    for path in _of_run(run_folder)[:-count]:
        remove_folder(path)


def _of_run(run_folder: Path) -> list[Path]:
    """Checkpoints of a run, by ascending step."""
    found = [path for path in (run_folder / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; UserError if `folder` is not one."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{folder} holds no complete engine checkpoint ({error}); make one with checkpoint_tools"
        ) from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {manifest.get('format_version')}, this engine reads "
            f"{FORMAT_VERSION}; convert it with the engine that wrote it"
        )
    return manifest


def load(folder: Path, entries: Mapping[str, Shard], *, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Fill `entries` in place from a checkpoint of any layout and check every checksum.

    Returns:
        The training values that were saved with it.

    Raises:
        UserError: an entry is missing or has another shape.
        Fault: an entry does not have the checksum it was saved with.
    """
    manifest = read_manifest(folder)
    _check_shapes(folder, entries)
    state = {name: shard.saved for name, shard in entries.items()}
    try:
        with torch.no_grad(), _plain_words(group):
            dcp.load(state, checkpoint_id=folder / "weights", process_group=group, no_dist=group is None)
    except Exception as error:  # what is damaged can raise anything
        words = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise Fault(f"weights of {folder} cannot be read ({words}); restore the missing or damaged file") from error
    for name, value in checksums(entries, group).items():
        if f"{value:016x}" != (kept := manifest["checksums"].get(name)):
            raise Fault(
                f"{name} in {folder} has checksum {value:016x}, it was saved with {kept}; "
                "the file is damaged, restore it"
            )
    training: dict[str, Any] = manifest["training"]
    return training


def _check_shapes(folder: Path, entries: Mapping[str, Shard]) -> None:
    stored = stored_shapes(folder)
    for name, shard in entries.items():
        if name not in stored:
            raise UserError(f"checkpoint {folder} has no entry {name}; it is of another model")
        if stored[name] != tuple(shard.saved.shape):
            raise UserError(
                f"{name} in {folder} has shape {stored[name]}, the model expects {tuple(shard.saved.shape)}; "
                "it is of another model"
            )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint, from its index alone."""
    return {name: tuple(entry.size) for name, entry in tensors_in(read_metadata(folder)).items()}


def tensors_in(metadata: dcp.metadata.Metadata) -> dict[str, dcp.metadata.TensorStorageMetadata]:
    """What the index of a checkpoint says of its tensors."""
    entries = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, dcp.metadata.TensorStorageMetadata)}


def read_metadata(folder: Path) -> dcp.metadata.Metadata:
    try:
        return dcp.FileSystemReader(folder / "weights").read_metadata()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{folder} holds no complete engine checkpoint ({error}); make one with checkpoint_tools"
        ) from None
