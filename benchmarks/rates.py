"""What a device and its links can do, in the figures of a cluster's file (ep_engine/planning/cluster.py).

    python -m benchmarks.rates [--ranks 2] [--gbit 100] [--kernels FILE] [--all-to-all FILE] [--out cluster.toml]

A device's rates are those of the products of a layer, forward and backward, counted as `planning/work.py` counts them,
by all ranks at once, who share this machine's cores. The links are this machine's own (gloo over the loopback), for
whose nominal rate `--gbit` stands; benchmarks/nodes.py measures those of emulated nodes. What is read from results of
benchmarks/kernels.py and benchmarks/all_to_all.py takes the place of what is measured: how fast rows are gathered, and
how fast they travel through shared memory, which is the engine's way inside a machine.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import plan_of
from benchmarks.ranks import Together, all_times, on_ranks
from benchmarks.timing import write_results
from ep_engine import threaded_experts
from ep_engine.machine import describe_machine, memory_gb
from ep_engine.ops import ExpertsBackward
from ep_engine.planning import work
from ep_engine.planning.cluster import Cluster, make_cluster
from ep_engine.transports.transport import Collective, Transport

TOKENS, DIM, HEADS, SEQUENCE = 2048, 512, 8, 512
EXPERTS, TOP_K, WIDTH = 32, 3, 128  # what a rank of two has of 64 experts and 6 choices
ADAMW = 8 << 20  # weights
MESSAGE = 4 << 20  # bytes from a rank to each other
REPEATS = 4  # exchanges that follow each other as in a step: after a pause a connection is slow again
KINDS = {"rows": "all_to_all", "gather": "all_gather", "reduce": "reduce_scatter"}
Times = dict[str, list[float]]


def device_calls() -> dict[str, Callable[[], object]]:
    """One of each kind of work."""
    torch.manual_seed(0)
    x_TD = torch.randn(TOKENS, DIM, requires_grad=True)
    w_DD = torch.randn(DIM, DIM, requires_grad=True)
    heads = [torch.randn(TOKENS // SEQUENCE, HEADS, SEQUENCE, DIM // HEADS, requires_grad=True) for _ in range(3)]
    weight = torch.zeros(ADAMW, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def dense() -> None:
        F.linear(x_TD, w_DD).backward(x_TD.detach())

    def attention() -> None:
        F.scaled_dot_product_attention(*heads, is_causal=True).backward(heads[0].detach())

    return {"dense": dense, "attention": attention, "experts": _experts_call(), "moved": optimizer.step}


def _experts_call() -> Callable[[], object]:
    ids_TK = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    sent, arrival = plan_of(ids_TK, EXPERTS)
    x_TD = torch.randn(TOKENS, DIM)
    w_gate_up, w_down = torch.randn(EXPERTS, 2 * WIDTH, DIM), torch.randn(EXPERTS, DIM, WIDTH)
    weight_N = torch.ones(len(arrival.copy_row_N))

    def experts() -> tuple[Tensor, ...]:
        gate_up_NF, _ = threaded_experts.forward(x_TD, arrival, w_gate_up, w_down)
        given = ExpertsBackward(x_TD, x_TD, arrival, w_gate_up, w_down, gate_up_NF, weight_N)
        _, _, weight_grads = threaded_experts.backward(given, later=False)
        return weight_grads()

    assert len(sent.row_slot_SW) == TOKENS, "all rows stay here"
    return experts


def device_rates(times_ms: Times) -> dict[str, float]:
    """Tera operations and gigabytes per second."""
    per_kind = {
        "dense": 2.0 * work.PASSES * TOKENS * DIM * DIM,
        "attention": 2 * work.ATTENTION_PASSES * TOKENS * SEQUENCE * DIM,
        "experts": 6.0 * work.PASSES * TOKENS * TOP_K * DIM * WIDTH,
    }
    ms = {name: statistics.median(times_ms[f"rate {name}"]) for name in (*per_kind, "moved")}
    rates = {f"{name}_tflops": operations / ms[name] * 1e-9 for name, operations in per_kind.items()}
    return rates | {"moved_gb_per_s": ADAMW * work.MOVED_BY_ADAMW / ms["moved"] * 1e-6}


def link_calls(transport: Transport) -> dict[str, Callable[[], object]]:
    """REPEATS exchanges of each kind, of MESSAGE bytes from a rank to each other, and of next to nothing."""
    size = transport.size
    rows = [0 if rank == transport.rank else MESSAGE for rank in range(size)]
    given, taken = (torch.zeros(sum(rows), 1, dtype=torch.uint8) for _ in range(2))
    counts = torch.zeros(size, 2, dtype=torch.int32)
    floats = torch.zeros(size * MESSAGE // 4)
    part = torch.zeros(MESSAGE // 4)
    once: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: transport.all_to_all(taken, given, rows, rows, "calibration"),
        "all_gather": lambda: dist.all_gather_into_tensor(floats, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, floats),
        "few": lambda: transport.exchange_counts(counts, "calibration"),
    }
    return {kind: lambda call=call: [call() for _ in range(REPEATS)] for kind, call in once.items()}


class LinkTimes:
    """Milliseconds of one exchange of each kind, and what a byte of it takes."""

    def __init__(self, times_ms: Times, ranks: int) -> None:
        ms = {kind: statistics.median(times_ms[f"link {kind}"]) / REPEATS for kind in ("few", *KINDS.values())}
        self.few_ms = ms["few"]
        num_bits = 8 * MESSAGE * (ranks - 1)
        self.ns_per_bit = {kind: (ms[call] - self.few_ms) * 1e6 / num_bits for kind, call in KINDS.items()}


def tier_of(gbit: float, limited: LinkTimes, free_gbit: float, free: LinkTimes) -> dict[str, Any]:
    """A tier from what exchanges take over links of two rates, of which the second hardly limits."""
    tier: dict[str, Any] = {"gbit_per_s": gbit, "latency_us": limited.few_ms * 1e3}
    for kind in KINDS:
        slower = (limited.ns_per_bit[kind] - free.ns_per_bit[kind]) / (1 / gbit - 1 / free_gbit)
        share = min(1.0, 1 / slower) if slower > 0 else 1.0
        software = free.ns_per_bit[kind] - 1 / (free_gbit * share)
        tier[kind] = {"share": share} | ({"software_gbit_per_s": 1 / software} if software > 0 else {})
    return tier


def moved_by(kernels: dict[str, Any], ranks: int) -> float:
    """Gigabytes per second of a rank, where they all gather rows: of a result of benchmarks/kernels.py."""
    setting = kernels["setting"]
    num_bytes = 2 * setting["tokens"] * setting["top_k"] * setting["dim"] * 4  # read and written
    return float(num_bytes / kernels["results"]["E=64 float32"]["times"]["gather"]["median_ms"] * 1e-6 / ranks)


def shared_rows(found: dict[str, Any], ranks: int, nominal_gbit: float) -> dict[str, Any]:
    """Latency and rows of a tier through shared memory: of a result of benchmarks/all_to_all.py with two sizes."""
    ms = {}
    for case, one in found["results"].items():
        of_ranks, size, kind = case.split(", ")
        if (of_ranks, kind) == (f"{ranks} ranks", "even"):
            ms[float(size.removesuffix(" MiB")) * (1 << 20)] = one["times"]["exchange shared_memory"]["median_ms"]
    (small, least), (large, most) = min(ms.items()), max(ms.items())
    ns_per_bit = (most - least) * 1e6 / (8 * (large - small))
    latency_ms = max(least - small * 8 * ns_per_bit * 1e-6, 0)
    software = 1 / max(ns_per_bit - 1 / nominal_gbit, 1e-3)
    return {"latency_us": latency_ms * 1e3, "rows": {"software_gbit_per_s": software}}


def to_toml(cluster: Cluster) -> str:
    """A cluster as the file that `read_cluster` reads."""
    lines: list[str] = []
    raw = cluster.model_dump(exclude_none=True)
    for name in [name for name, value in raw.items() if not isinstance(value, dict)]:
        lines.append(f"{name} = {_toml(raw[name])}")
    for name in [name for name, value in raw.items() if isinstance(value, dict)]:
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in raw[name].items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _measure(rank: int, rounds: int) -> dict[str, Any]:
    assert dist.group.WORLD is not None, "the ranks have met"
    transport = Collective(dist.group.WORLD)
    calls = {f"rate {name}": Together(call) for name, call in device_calls().items()}
    calls |= {f"link {name}": Together(call) for name, call in link_calls(transport).items()}
    return all_times(calls, rounds=rounds)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gbit", type=float, default=100.0, help="nominal, of links inside this machine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--all-to-all", type=Path)
    parser.add_argument("--out", type=Path, help="cluster.toml to write")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times_ms = on_ranks(_measure, args.rounds, world_size=args.ranks)
    links = LinkTimes(times_ms, args.ranks)
    node: dict[str, Any] = {"gbit_per_s": args.gbit, "latency_us": links.few_ms * 1e3}
    for kind, ns in links.ns_per_bit.items():
        node[kind] = {"software_gbit_per_s": 1 / max(ns - 1 / args.gbit, 1e-3)}
    device = {"memory_gb": memory_gb() / args.ranks, **device_rates(times_ms)}
    if args.kernels is not None:
        device["moved_gb_per_s"] = moved_by(json.loads(args.kernels.read_text()), args.ranks)
    if args.all_to_all is not None:
        node |= shared_rows(json.loads(args.all_to_all.read_text()), args.ranks, args.gbit)
    cluster = make_cluster(
        {
            "name": f"{args.ranks} ranks on {describe_machine()}",
            "origin": "measured",
            "sources": ("benchmarks/rates.py",),
            "nodes": 1,
            "devices_per_node": args.ranks,
            "device": device,
            "node": node,
        },
        "what was measured",
    )
    if args.out is not None:
        args.out.write_text(to_toml(cluster))
    setting = {"ranks": args.ranks, "rounds": args.rounds, "tokens": TOKENS, "dim": DIM}
    write_results(args.json, __doc__.splitlines()[0], setting, cluster.model_dump())


if __name__ == "__main__":
    main()
