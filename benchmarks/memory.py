"""How near is `ep-engine plan` to the memory that a step takes?

    python -m benchmarks.memory [--layouts NAME ...] [--batch-size ROWS] [--json OUT]

Every layout trains one step to warm up and one that is measured: after each operator the bytes of all tensors that live
in the process are added up (their storages, each once, those of autograd and FSDP2 too); the most is the peak. It is
exact and the same on every run, and sees a temporary unless it lives inside one operator. What arrived through shared
memory is counted by the pages of the arenas. Bytes beside tensors are not: `outside` is what malloc has given out
beyond, at the end of the step (code and caches of oneDNN and gloo).
"""

import argparse
import ctypes
import gc
import json
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ranks import on_ranks
from benchmarks.timing import write_results
from ep_engine.config import RunConfig, make_config
from ep_engine.data.tokens import write_token_file
from ep_engine.mesh import World, process_groups
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.planning.plan_run import plan_run
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer

CPU = torch.device("cpu")
MODEL = ModelConfig(  # 29 million parameters
    vocab_size=4096,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=4096,
    moe=MoEConfig(num_experts=16, top_k=2, expert_hidden_size=256),
)
PARTS = {"micro_batches": 4}
# Ranks, and what is set.
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one process": (1, {}),
    "bfloat16": (1, {"train": {"dtype": "bfloat16"}}),
    "4 parts": (1, {"train": PARTS}),
    "recompute selective": (1, {"train": {"recompute": "selective"}}),
    "recompute full": (1, {"train": {"recompute": "full"}}),
    "dp2": (2, {}),
    "dp2, weights gathered again": (2, {"parallel": {"reshard_after_forward": True}}),
    "dp2, again, bfloat16, 4 parts": (
        2,
        {"parallel": {"reshard_after_forward": True}, "train": PARTS | {"dtype": "bfloat16"}},
    ),
    "ep2 collective": (2, {"parallel": {"expert_parallel_size": 2}, "moe": {"transport": "collective"}}),
    "ep2 shared_memory": (2, {"parallel": {"expert_parallel_size": 2}, "moe": {"transport": "shared_memory"}}),
    "ep2 fixed rows, full": (
        2,
        {
            "parallel": {"expert_parallel_size": 2},
            "moe": {"fixed_rows": 512, "transport": "collective"},
            "train": {"recompute": "full"},
        },
    ),
    "tp2": (2, {"parallel": {"tensor_parallel_size": 2}}),
    "tp2 ep2 bfloat16": (
        2,
        {"parallel": {"tensor_parallel_size": 2, "expert_parallel_size": 2}, "train": {"dtype": "bfloat16"}},
    ),
    "pp2 gpipe": (2, {"parallel": {"pipeline_parallel_size": 2, "pipeline_schedule": "gpipe"}, "train": PARTS}),
    "pp2 1f1b": (2, {"parallel": {"pipeline_parallel_size": 2}, "train": PARTS}),
    "pp2 interleaved": (
        2,
        {"parallel": {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved"}, "train": PARTS},
    ),
    "pp2 zbv": (2, {"parallel": {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}, "train": PARTS}),
    "pp2 1f1b bfloat16, full": (
        2,
        {"parallel": {"pipeline_parallel_size": 2}, "train": PARTS | {"dtype": "bfloat16", "recompute": "full"}},
    ),
}


def make_files(folder: Path, model: ModelConfig = MODEL, num_tokens: int = 50_000) -> None:
    """A token file, and the model.json of a model whose weights are drawn."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.json").write_text(model.model_dump_json())
    draw = np.random.default_rng(0)
    write_token_file(folder / "train", [draw.integers(0, model.vocab_size, num_tokens)], model.vocab_size)


def config_of(folder: Path, sections: dict[str, dict[str, Any]], **data: int) -> RunConfig:
    """The run of a layout."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"checkpoint": str(folder / "model")},
        "data": {"train": str(folder / "train"), **({"sequence_length": 128, "batch_size": 8} | data)},
        "train": {"steps": 3, "warmup_steps": 1},
        "output": {"folder": str(folder / "run")},
    }
    names = raw.keys() | sections.keys()
    return make_config({name: {**raw.get(name, {}), **sections.get(name, {})} for name in names}, "a layout")


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that live, after every operator within the block."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._shared = _shared_arenas()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes by itself
        result = func(*args, **(kwargs or {}))
        found = [self._see(leaf) for leaf in tree_leaves((args, kwargs, result))]
        # Adding up takes longer than a small operator: not where nothing can have become more. FSDP2 makes room before
        # it copies.
        if any(found) or "copy" in str(func):
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Of the storages seen so far, each in its present size: FSDP2 empties and fills them again."""
        found = 0
        for key, storage in [(key, ref()) for key, ref in self._storages.items()]:
            if storage is None:
                del self._storages[key]
            else:
                found += storage.nbytes()
        return found

    def begin(self) -> None:
        """Forget the peak; arenas are there now."""
        gc.collect()
        self._shared = _shared_arenas()
        for key, storage in [(key, ref()) for key, ref in self._storages.items()]:
            if storage is None or self._is_shared(storage):
                del self._storages[key]
        self.peak = 0

    def _is_shared(self, storage: torch.UntypedStorage) -> bool:
        return any(first <= storage.data_ptr() < end for first, end, _ in self._shared)

    def _see(self, leaf: Any) -> bool:
        """Whether it is a tensor whose storage was not known."""
        local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        local = local.elem if isinstance(local, AsyncCollectiveTensor) else local
        if not isinstance(local, torch.Tensor) or local.device.type != "cpu":
            return False
        storage = local.untyped_storage()
        known = self._storages.get(storage._cdata)
        if self._is_shared(storage) or (known is not None and known() is storage):
            return False
        self._storages[storage._cdata] = weakref.ref(storage)
        return True


def _shared_arenas() -> list[tuple[int, int, int]]:
    """First and last address of every arena mapped here, and this process's share of its pages in bytes."""
    return list(_read_arenas(Path("/proc/self/smaps").read_text().splitlines()))


def _read_arenas(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    for number, line in enumerate(lines):
        if "/memfd:ep_engine" in line:
            first, end = (int(address, 16) for address in line.split()[0].split("-"))
            share = next(line for line in lines[number:] if line.startswith("Pss:"))
            yield first, end, int(share.split()[1]) * 1024


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _in_use() -> int:
    """Bytes that malloc has given out."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def measure(rank: int, world_size: int, config: RunConfig, results: Path) -> None:
    """One rank of a layout; writes RANK.json."""
    run = replace(resolve(config, world_size, overwrite=True), checkpoint=None)  # weights are drawn
    dist.barrier()
    before = _in_use()
    sizes = {"tp_size": config.parallel.tensor_parallel_size, "pp_size": config.parallel.pipeline_parallel_size}
    etp = config.parallel.expert_tensor_parallel_size
    world = World(rank, world_size, rank, world_size)
    with process_groups(world, CPU, config.parallel.expert_parallel_size, 60.0, etp_size=etp, **sizes) as meshes:
        with LiveBytes() as live:
            trainer = Trainer(run, meshes, CPU)
            trainer.one_step()
            live.begin()
            trainer.one_step()
        pages = sum(share for _, _, share in _shared_arenas())
        gc.collect()
        found = {"peak": live.peak + pages, "outside": _in_use() - before - live.now()}
        (results / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()


def _measure_all(rank: int, config: RunConfig, results: Path) -> dict[str, Any]:
    measure(rank, dist.get_world_size(), config, results)
    return {}


def compared(config: RunConfig, world_size: int, results: Path) -> list[dict[str, float]]:
    """Predicted and measured bytes of every rank, and their ratio; `results` holds what `measure` wrote."""
    plan = plan_run(config, world_size)
    rows = []
    for rank in range(world_size):
        found = json.loads((results / f"{rank}.json").read_text())
        predicted = plan["memory"]["ranks"][rank]["total"]
        ratio = predicted / found["peak"]
        rows.append({"rank": rank, "predicted": predicted, "measured": found["peak"], "ratio": ratio} | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch-size", type=int, default=8, help="more rows: more activations beside the weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.layouts:
        world_size, sections = LAYOUTS[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_files(folder)
            config = config_of(folder, sections, batch_size=args.batch_size)
            on_ranks(_measure_all, config, folder, world_size=world_size)
            results[name] = compared(config, world_size, folder)
        for row in results[name]:
            mega = {key: row[key] / 1e6 for key in ("predicted", "measured", "outside")}
            print(  # noqa: T201
                f"{name:32} rank {row['rank']}  predicted {mega['predicted']:7.1f} MB  measured "
                f"{mega['measured']:7.1f} MB  ratio {row['ratio']:.3f}  outside {mega['outside']:6.1f} MB"
            )
    setting = {"model": MODEL.model_dump(exclude_none=True), "sequence_length": 128, "batch_size": args.batch_size}
    write_results(args.json, "memory of a rank in a step, predicted and measured", setting, results)


if __name__ == "__main__":
    main()
