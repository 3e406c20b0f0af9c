"""What is in a model folder: kind, sizes, parameters, and shape, dtype and checksum of every entry."""

from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint_tools.families import named_family
from checkpoint_tools.source import open_source
from ep_engine.checksum import checksum
from ep_engine.model_config import ModelConfig
from ep_engine.progress import track


@dataclass(frozen=True)
class Entry:
    """One weight."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str  # 16 hexadecimal digits, position-keyed: ep_engine/checksum.py


@dataclass(frozen=True)
class Inspection:
    """What a folder holds."""

    folder: str
    kind: str  # huggingface or engine
    architecture: str
    config: ModelConfig
    num_parameters: int
    num_active_parameters: int  # those that one token meets: k of E experts
    num_bytes: int
    entries: dict[str, Entry]

    def to_json(self) -> dict[str, object]:
        """Plain values for `--json`."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("config", "entries")},
            "config": self.config.model_dump(),
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
        }


def inspect(folder: Path) -> Inspection:
    """Read all of a Hugging Face folder or an engine checkpoint.

    Raises:
        UserError: as `open_source`.
        Fault: an entry of an engine checkpoint does not have the checksum it was saved with.
    """
    model = open_source(folder)
    known = model.tensors.deferred
    entries = {
        name: Entry(
            known[name].shape, str(known[name].dtype).removeprefix("torch."), f"{checksum(model.tensors[name]):016x}"
        )
        for name in track(list(known), "reading weights")
    }
    sizes = {name: one.num_elements for name, one in known.items()}
    total = sum(sizes.values())
    idle = 0
    if model.config.moe is not None:
        of_expert = 3 * model.config.hidden_size * model.config.moe.expert_hidden_size
        idle = of_expert * sum(e - model.config.moe.top_k for e in model.config.experts_of_layer())
    return Inspection(
        folder=str(folder),
        kind=model.kind,
        architecture=(model.family or named_family(model.config)).architecture,
        config=model.config,
        num_parameters=total,
        num_active_parameters=total - idle,
        num_bytes=sum(one.num_bytes for one in known.values()),
        entries=entries,
    )
