"""What every conversion has in common: whole or not at all, in a small memory, checked before it takes its name.

open the source -> tensors that are made when they are written -> draft -> the same logits? -> the final name
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.forward import outputs
from checkpoint_tools.source import Source, open_source
from checkpoint_tools.verify import TOLERANCE, LogitGap, compare_outputs, random_tokens
from ep_engine.checkpoint import read_manifest
from ep_engine.checksum import checksum
from ep_engine.deferred import Tensors
from ep_engine.draft import Draft, drafted
from ep_engine.errors import Fault
from ep_engine.model_config import ModelConfig
from ep_engine.progress import byte_bar, track
from ep_engine.version import VERSION
from ep_engine.whole_model import check_tensors, write_into

_SAMPLE_BYTES = 1 << 30  # that a dry run makes and writes to see how fast that is


@dataclass(frozen=True)
class How:
    """How an output is written."""

    overwrite: bool = False  # replace a non-empty folder
    resume: bool = False  # go on with what an interrupted run left
    check_logits: bool = True  # run the source and the output on random tokens before the output takes its name


@dataclass(frozen=True)
class Estimate:
    """What a conversion would need."""

    output_bytes: int
    free_bytes: int  # on the disk of the output
    memory_bytes: int  # private, at most
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """An output in the making.

    Attributes:
        source: what it is made of.
        out: its folder.
        tool: the command, for the manifest.
        options: of the command, by which an interrupted run is known again.
        tensors: what is written, given the draft that it is written into.
        held_bytes: kept in memory beside the tensors that are being written.
        same_names: whether a name means the same weight in both; else only what is copied as it is does.
        alike: what weights of the output that the source does not have must be, made from the source in another way.
        compare: how far the logits of source and output may be apart; None: they are not expected to be the same.
        all_experts: compare them with every expert on.
    """

    source: Source
    out: Path
    tool: str
    options: Mapping[str, Any]
    tensors: Callable[[Draft], Tensors]
    held_bytes: int = 0
    same_names: bool = True
    alike: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    compare: float | None = TOLERANCE
    all_experts: bool = False

    @property
    def model(self) -> ModelConfig:
        """What is written."""
        return self.source.config

    def write(self, draft: Draft, tensors: Tensors, advance: Callable[[int], None]) -> None:
        """Write the tensors and all else into the draft."""
        raise NotImplementedError

    def run(self, how: How) -> LogitGap | None:
        """Make the output.

        Returns:
            How far its logits are from those of the source, if they were compared.

        Raises:
            UserError: the output exists or is being made by somebody else.
            Fault: a weight is not that of the source, or it does not compute what the source computes.
            NoRoom: the disk is full.
        """
        about = {
            "tool": self.tool,
            "version": VERSION,
            "source": str(self.source.folder.resolve()),
            "state of the source": state_of(self.source.folder),
            "options": dict(self.options),
        }
        with drafted(self.out, about, overwrite=how.overwrite, resume=how.resume) as draft:
            tensors = self.tensors(draft)
            total = sum(deferred.num_bytes for deferred in tensors.deferred.values())
            with byte_bar(f"writing {self.out.name}", total) as advance:
                self.write(draft, tensors, advance)
            if not how.check_logits:
                return None
            made = open_source(draft.folder)
            self._check_weights(made, tensors)
            return self._compared(made)

    def manifest(self) -> dict[str, Any]:
        """What an output says of how it came about; with hashes of the split it comes from, and of its placement."""
        about: dict[str, Any] = {
            "tool": self.tool,
            "source": str(self.source.folder),
            "source_hash": self.source.hash(),
            "options": dict(self.options),
        }
        kept = read_manifest(self.source.folder) if self.source.kind == "engine" else {}
        if "split_hash" in kept:
            about["split_hash"] = kept["split_hash"]
        devices = self.model.moe and self.model.moe.routing.device_of_expert
        if devices:
            about["placement_hash"] = hashlib.sha256(json.dumps(devices).encode()).hexdigest()
        return about

    def estimate(self) -> Estimate:
        """What it would need, from the first layer, or a part of it, which is made and written, and deleted."""
        above = next(folder for folder in self.out.absolute().parents if folder.exists())
        with TemporaryDirectory(prefix=f".{self.out.name}.dry-run-", dir=above) as beside:
            draft = Draft(Path(beside))
            tensors = self.tensors(draft)
            sizes = {name: deferred.num_bytes for name, deferred in tensors.deferred.items()}
            layer = [name for name in sizes if "layers.0." in name]
            sample = layer[:1]
            for name in layer[1:]:
                if sum(sizes[n] for n in sample) + sizes[name] <= _SAMPLE_BYTES:
                    sample.append(name)
            begin = time.perf_counter()
            with (Path(beside) / "sample").open("wb") as file:
                for name in sample:
                    file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
                os.fsync(file.fileno())
            seconds = time.perf_counter() - begin
            draft.close()
        total = sum(sizes.values())
        return Estimate(
            output_bytes=total,
            free_bytes=shutil.disk_usage(above).free,
            memory_bytes=self.held_bytes + 4 * max(sizes.values()),  # made, being written, each in a second copy
            seconds=seconds * total / sum(sizes[name] for name in sample),
        )

    def _check_weights(self, made: Source, tensors: Tensors) -> None:
        """Fault unless what was written is, under every name that both have, what is in the source, to the bit.

        So an expert that was lost, doubled or changed on its way is found also where no token of the next check comes.
        """
        here = self.source.tensors.deferred
        both = [n for n in made.tensors if n in here and (self.same_names or tensors.deferred[n] is here[n])]
        for name in track([*both, *self.alike], "checking weights"):
            wanted = self.alike[name]() if name in self.alike else self.source.tensors[name]
            found = made.tensors[name]
            if found.dtype != wanted.dtype or found.shape != wanted.shape or checksum(found) != checksum(wanted):
                raise Fault(
                    f"{_in_words(name)} is not that of {self.source.folder}; unless that was changed meanwhile, this "
                    "is our bug, report it"
                )

    def _compared(self, made: Source) -> LogitGap:
        tokens = random_tokens(self.source.config, made.config, seed=0)
        before, after = (
            dict(outputs(one.config, one.tensors, tokens, all_experts=self.all_experts)) for one in (self.source, made)
        )
        gap = compare_outputs(before, after, TOLERANCE if self.compare is None else self.compare)
        if self.compare is not None and gap.first_difference is not None:
            raise Fault(
                f"the output does not compute what {self.source.folder} computes: outputs first differ at "
                f"{gap.first_difference}, logits by {gap.max_abs_diff:.3g} (up to {gap.logit_scale:.3g}); check the "
                "source's weights for NaN, else report it"
            )
        return gap


@dataclass(frozen=True, kw_only=True)
class ToCheckpoint(Conversion):
    """An engine checkpoint.

    Attributes:
        config: of the model that is written.
        finish: writes what lies beside it, and gives what its manifest says besides.
    """

    config: ModelConfig
    finish: Callable[[Draft], Mapping[str, Any]] = lambda _: {}

    @property
    def model(self) -> ModelConfig:
        """What is written."""
        return self.config

    def write(self, draft: Draft, tensors: Tensors, advance: Callable[[int], None]) -> None:
        """Write the checkpoint."""
        check_tensors(self.config, tensors)
        whole = self.source.tensors.deferred

        def made(sums: Mapping[str, int]) -> dict[str, Any]:
            # What was copied need not be hashed again.
            self.source.checksums.update({n: sums[n] for n, one in tensors.deferred.items() if one is whole.get(n)})
            return {**self.manifest(), **self.finish(draft)}

        write_into(draft, self.config, tensors, source=self.source.folder, made=made, advance=advance)


def _in_words(entry: str) -> str:
    """`w_up of expert 3 of layer 1` for an expert's weight."""
    parts = entry.split(".")
    if ".moe.experts." not in entry:
        return entry
    return f"{parts[5]} of expert {parts[4]} of layer {parts[1]}"


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files, by which a changed source is known."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
