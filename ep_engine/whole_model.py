"""A whole model in a single process, tensor by tensor: written as a checkpoint, or read from one, in a small memory.

The files are those of checkpoint.py, in torch.distributed.checkpoint's format. While a tensor is written the next one
is made and hashed; the weights lie in several files, so that an interrupted conversion can go on with the file that it
was at.
"""

import io
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_engine.checkpoint import read_manifest, read_metadata, save_words, tensors_in, without_crc
from ep_engine.checksum import checksum
from ep_engine.deferred import Deferred, Tensors
from ep_engine.direct_file import DirectFile
from ep_engine.draft import Draft, drafted
from ep_engine.entries import expected_entries
from ep_engine.errors import Fault, UserError
from ep_engine.model_config import ModelConfig, read_model_config

FILE_BYTES = 1 << 30  # of a weight file, unless a single tensor is larger


class Made(NamedTuple):
    """A tensor and its checksum."""

    tensor: Tensor
    checksum: int


def made_ahead(tensors: Tensors, names: Sequence[str]) -> Generator[tuple[str, Made]]:
    """Tensors in order, each made and hashed by another thread while the one before is in use."""

    def make(name: str) -> Made:
        tensor = tensors[name].contiguous()
        return Made(tensor, checksum(tensor))

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Made] | None = None
        for name, following in pairwise([*names, None]):
            assert name is not None, "only the last is"
            made = make(name) if ahead is None else ahead.result()
            ahead = None if following is None else pool.submit(make, following)
            yield name, made


def in_files(tensors: Tensors, file_bytes: int) -> list[list[str]]:
    """The names of tensors, in order, cut into files of at most so many bytes, or one tensor."""
    files: list[list[str]] = [[]]
    room = file_bytes
    for name, deferred in tensors.deferred.items():
        if files[-1] and deferred.num_bytes > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= deferred.num_bytes
    return files


def write_model(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors, one per name of `expected_entries`, as a checkpoint; see `write_into`."""
    whole = tensors if isinstance(tensors, Tensors) else Tensors.of(tensors)
    check_tensors(config, whole)
    with drafted(folder, {}, overwrite=overwrite) as draft:
        write_into(draft, config, whole, source=source)


def check_tensors(config: ModelConfig, tensors: Tensors) -> None:
    """UserError if a tensor is missing, unknown or has the wrong shape: nothing is dropped without a word."""
    expected = expected_entries(config)
    for name in expected.keys() ^ tensors.deferred.keys():
        kind = "is missing" if name in expected else "is not known to the model"
        raise UserError(f"tensor {name} {kind} ({len(tensors)} given, {len(expected)} expected); nothing was written")
    for name, shape in expected.items():
        if (found := tensors.deferred[name].shape) != shape:
            raise UserError(f"{name} has shape {found}, model.json says {shape}; nothing was written")


def write_into(
    draft: Draft,
    config: ModelConfig,
    tensors: Tensors,
    *,
    source: Path | None = None,
    made: Callable[[Mapping[str, int]], Mapping[str, Any]] = lambda _: {},
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a checkpoint into a draft; files that it has already are not written again.

    Args:
        draft: the folder.
        config: the model.
        tensors: an entry each, as `check_tensors` wants them.
        source: checkpoint or Hugging Face folder whose tokenizer files are carried along.
        made: called last with all checksums, gives what the manifest is to say of how the model came about.
        advance: called with the number of bytes done.
    """
    weights = draft.folder / "weights"
    weights.mkdir(exist_ok=True)
    in_order = Tensors({name: tensors.deferred[name] for name in expected_entries(config)})
    stored: dict[str, dict[str, tuple[int, int, int]]] = {}
    done = 0
    files = {f"weights/__0_{n}.distcp": names for n, names in enumerate(in_files(in_order, FILE_BYTES))}
    left = [name for file, names in files.items() if file not in draft.done for name in names]
    with closing(made_ahead(in_order, left)) as ready:
        for file, names in files.items():
            if file not in draft.done:
                draft.note(file, _write_file(draft.folder / file, islice(ready, len(names)), done, advance))
            stored[Path(file).name] = draft.done[file]
            done += sum(in_order.deferred[name].num_bytes for name in names)
            advance(done)
    _write_index(weights / ".metadata", in_order, stored)
    sums = {name: known[2] for of_file in stored.values() for name, known in of_file.items()}
    save_words(draft.folder, config, sums, training={}, source=source, made=made(sums))


def _write_file(
    path: Path, tensors: Iterator[tuple[str, Made]], done: int, advance: Callable[[int], None]
) -> dict[str, tuple[int, int, int]]:
    """Where each tensor of a file begins, how many bytes it has there, and its checksum."""
    written = {}
    with DirectFile(path) as file, without_crc():
        for name, made in tensors:
            begin = file.tell()
            torch.save(_alone(made.tensor), file)  # type: ignore[arg-type]
            written[name] = (begin, file.tell() - begin, made.checksum)
            done += made.tensor.nbytes
            advance(done)
    return written


def _alone(tensor: Tensor) -> Tensor:
    """A contiguous tensor, the same memory, that does not bring the rest of its storage along."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    own = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())
    return own.view(tensor.dtype).view(tensor.shape)


def _write_index(path: Path, tensors: Tensors, stored: Mapping[str, Mapping[str, tuple[int, int, int]]]) -> None:
    described, places = {}, {}
    for file, of_file in stored.items():
        for name, (begin, length, _) in of_file.items():
            size = torch.Size(tensors.deferred[name].shape)
            origin = torch.Size([0] * len(size))
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensors.deferred[name].dtype), size, [ChunkStorageMetadata(origin, size)]
            )
            places[MetadataIndex(name, origin)] = _StorageInfo(file, begin, length)
    names = {name: (name,) for name in described}
    metadata = Metadata(described, planner_data=names, storage_data=places, storage_meta=StorageMeta())  # type: ignore[arg-type]
    with path.open("wb") as index:
        pickle.dump(metadata, index)
        os.fsync(index.fileno())


def read_model(folder: Path) -> tuple[ModelConfig, Tensors]:
    """The configuration and every weight of a checkpoint of any layout; a weight is read, and its checksum verified,
    when it is asked for.

    Raises:
        UserError: it is no complete checkpoint, or lacks an entry.
        Fault: when asked for, an entry cannot be read or does not have the checksum it was saved with.
    """
    config = read_model_config(folder / "model.json")
    manifest, metadata = read_manifest(folder), read_metadata(folder)
    stored = tensors_in(metadata)
    deferred = {}
    for name, shape in expected_entries(config).items():
        if name not in stored or name not in manifest["checksums"]:
            raise UserError(f"checkpoint {folder} has no entry {name}; it is of another model")
        if tuple(stored[name].size) != shape:
            raise UserError(
                f"{name} in {folder} has shape {tuple(stored[name].size)}, the model expects {shape}; it is of another "
                "model"
            )
        kept = manifest["checksums"][name]
        deferred[name] = Deferred(
            shape, stored[name].properties.dtype, _reader(folder, name, stored[name], metadata.storage_data, kept)
        )
    return config, Tensors(deferred)


def _reader(
    folder: Path, name: str, described: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo], kept: str
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            tensor = _assemble(folder / "weights", name, described, places)
        except Exception as error:  # what is damaged can raise anything
            words = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise Fault(f"weights of {folder} cannot be read ({words}); restore the missing or damaged file") from error
        if (found := f"{checksum(tensor):016x}") != kept:
            raise Fault(
                f"{name} in {folder} has checksum {found}, it was saved with {kept}; the file is damaged, restore it"
            )
        return tensor

    return read


def _assemble(
    weights: Path, name: str, described: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]
) -> Tensor:
    """A tensor from the parts that the ranks which saved it had."""
    whole = None
    for chunk in described.chunks:
        info = places[MetadataIndex(name, chunk.offsets)]
        with (weights / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            part: Tensor = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        if chunk.sizes == described.size:
            return part
        if whole is None:
            whole = torch.empty(described.size, dtype=described.properties.dtype)
        whole[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
    assert whole is not None, "a tensor has parts"
    return whole
