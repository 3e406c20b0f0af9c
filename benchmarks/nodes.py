"""What do placement and constrained routing save where the network between nodes hurts?

    sudo python -m benchmarks.nodes [--nodes 2 4] [--bandwidths 100mbit 1gbit] [--rounds 3] [--json OUT]

Emulated nodes of one rank each (launch/nodes.sh) share the experts of a MoE (D 512, 4 layers, E 64, k 6, F 128, 2048
tokens a rank, float32, gloo) that is trained first, on the text of this Python's standard library. Every arm starts
from its weights and takes turns with the others:

    plain          one row per copy, experts in the order of their ids
    dedup          one row per token and node
    placed         the same, experts placed by `ep-engine place --load-cap 1.1` on a profile of the model
    c2r T          and partners only among the T closest collaborators of the top-1 expert
    group_limited  dedup and at most one node per token, that of the top-1 expert, experts in the order of their ids:
                   DeepSeek-V2's device-limited routing for M = 1
    grouped M      at most M nodes per token, of those of the placement: c2r_grouped, T 32
    hierarchical   (2 nodes of 2 ranks) one row per node between nodes, handed on inside; flat: one row per rank

`step` is a whole optimiser step, `exchange` all exchanges of it alone, forward and backward; `bytes` left a rank for
another per token. A step is also predicted: what it takes over links of 10 Gbit/s, plus for every exchange of rows the
bytes in or out of the rank that has most of them, and for gathering weights and reducing gradients their bytes, over
what links carried of each kind of exchange in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.nodes_rank import CALIBRATION, REPEATS, ROWS_PER_RANK
from benchmarks.ranks import summary
from benchmarks.timing import print_table, write_results
from benchmarks.trained_moe import SEQUENCE, MoEShape, run_config, train_moe
from ep_engine.collaboration import Profile
from ep_engine.ledger import DIRECTIONS
from ep_engine.place import place
from ep_engine.placement import Placement
from ep_engine.plan_run import plan_run

ROOT = Path(__file__).resolve().parent.parent
FREE = "10gbit"  # whose steps are taken for compute
TOP_T = (8, 16, 32)
GROUPED_T = 32
LOAD_CAP = 1.1
KINDS = ("all_to_all", "all_gather", "reduce_scatter")
Arms = dict[str, dict[str, Any]]


def make_arms(folder: Path, checkpoint: Path, counted: Profile, nodes: int, per_node: int) -> Arms:
    """Sections of the run file of each arm; writes the placements."""
    ranks = nodes * per_node
    placed, _ = place(counted, ranks, nodes=nodes, load_cap=LOAD_CAP)
    contiguous = Placement.contiguous(counted.num_experts, ranks, counted.num_layers, nodes=nodes)
    paths = {}
    for name, placement in (("placed", placed), ("contiguous", contiguous)):
        paths[name] = {"placement": str(folder / f"{name}-{nodes}x{per_node}.json")}
        placement.save(Path(paths[name]["placement"]))
    lists = {"profile": str(folder / "profile.npz")}
    grouped = {"rule": "c2r_grouped", "top_t": GROUPED_T, **lists}
    ways: Arms
    if per_node > 1:
        ways = {
            f"{transport} {name}": {"moe": {"transport": kind, **paths[which]}}
            for name, which in (("dedup", "contiguous"), ("placed", "placed"))
            for transport, kind in (("flat", "collective"), ("hierarchical", "hierarchical"))
        }
    else:
        ways = {
            "plain": {"moe": {"combine": "per_expert"}},
            "dedup": {},
            "placed": {"moe": paths["placed"]},
            **{f"c2r {t}": {"moe": paths["placed"], "routing": {"rule": "c2r", "top_t": t, **lists}} for t in TOP_T},
            "group_limited": {
                "moe": paths["contiguous"],
                "routing": {"rule": "c2r_grouped", "top_t": counted.num_experts - 1, **lists},
            },
            **{
                f"grouped {m}": {"moe": paths["placed"], "routing": {**grouped, "max_devices": m}}
                for m in range(1, nodes // 2 + 1)
            },
        }
    common = {
        "model": {"checkpoint": str(checkpoint)},
        "train": {"steps": 1000, "learning_rate": 1e-4, "min_learning_rate": 1e-4, "load_balance": 0.01},
        "parallel": {"expert_parallel_size": ranks},
    }
    return {
        name: {**common, **way, "moe": {"transport": "collective", **way.get("moe", {})}} for name, way in ways.items()
    }


def on_nodes(folder: Path, arms: Arms, nodes: int, per_node: int, bandwidth: str, rounds: int) -> dict[str, Any]:
    """Run all arms on emulated nodes; what the first rank wrote, and what nodes.sh says of the links."""
    (folder / "arms.json").write_text(json.dumps(arms))
    line = [str(ROOT / "launch/nodes.sh"), str(nodes), "--bandwidth", bandwidth, "--ranks-per-node", str(per_node)]
    line += ["-m", "benchmarks.nodes_rank", str(folder), str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(line[1:])} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    found["goodput"] = [words for words in done.stderr.splitlines() if words.startswith("node ")]
    return found


class Links:
    """What the links carried of each kind of exchange, REPEATS times CALIBRATION bytes from a rank to each other."""

    def __init__(self, times_ms: dict[str, list[float]], nodes: int) -> None:
        ms = {kind: statistics.median(times_ms[f"link {kind}"]) / REPEATS for kind in ("few", *KINDS)}
        self.few = ms["few"]
        self.bytes_per_ms = {kind: CALIBRATION * (nodes - 1) / (ms[kind] - self.few) for kind in KINDS}

    def megabits(self) -> dict[str, float]:
        """Mbit/s in and out of a rank at once."""
        return {kind: rate * 8e-3 for kind, rate in self.bytes_per_ms.items()}

    def rows_ms(self, sent: list[list[int]]) -> float:
        """The exchanges of experts' rows, one after the other, each as slow as the rank with most bytes in or out."""
        total = len(sent) // len(DIRECTIONS) * self.few  # the counts
        for there, back in zip(sent[::2], sent[1::2], strict=True):
            for out, other in ((there, back), (back, there)):
                # What a rank sends back has come to it: a byte the other way stands for so many of this.
                ratio = sum(out) / max(sum(other), 1)
                most = max(max(out), max(other) * ratio)
                total += self.few + most / self.bytes_per_ms["all_to_all"]
        return total

    def dense_ms(self, traffic: dict[str, dict[str, int]]) -> float:
        """Gathered weights and summed gradients."""
        gather, reduce = (sum(traffic[kind].values()) for kind in ("gather_weights", "reduce_gradients"))
        return gather / self.bytes_per_ms["all_gather"] + reduce / self.bytes_per_ms["reduce_scatter"]


def describe(found: dict[str, Any], arms: Arms) -> dict[str, Any]:
    """Times, bytes and ratios of one setting."""
    result: dict[str, Any] = {
        kind: {name: summary(found["times_ms"][f"{kind} {name}"]) for name in arms} for kind in ("step", "exchange")
    }
    result["bytes"] = {
        name: sum(map(sum, exchanges)) / (len(exchanges[0]) * found["tokens"][name])
        for name, exchanges in found["sent"].items()
    }
    return result | {"ratios": _ratios(result), "goodput": found["goodput"]}


def predict(
    found: dict[str, Any], free: dict[str, Any], measured: dict[str, Any], arms: Arms, folder: Path, nodes: int
) -> dict[str, Any]:
    """Steps as the sum of what they take where links cost little, of exchanged rows and of dense traffic."""
    links = Links(found["times_ms"], nodes)
    predicted: dict[str, Any] = {"links_mbit_per_s": links.megabits()}
    for name, sections in arms.items():
        config = run_config(folder, "arm", rows=ROWS_PER_RANK * nodes, **sections)
        traffic = plan_run(config, nodes, ranks_per_node=1)["traffic"]["dense_of_ranks"]
        parts = {
            "compute_ms": statistics.median(free["times_ms"][f"step {name}"]),
            "dense_ms": max(links.dense_ms(of_rank) for of_rank in traffic),
            "rows_ms": links.rows_ms(found["sent"][name]),
        }
        step, exchange = (measured[kind][name]["median_ms"] for kind in ("step", "exchange"))
        predicted[name] = {
            **parts,
            "step_over_measured": sum(parts.values()) / step,
            "exchange_over_measured": parts["rows_ms"] / exchange,
        }
    return predicted


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """Above 1 where grouped routing, or going over nodes, takes less."""
    amounts = {kind: {name: one["median_ms"] for name, one in result[kind].items()} for kind in ("step", "exchange")}
    ratios: dict[str, float] = {}
    for kind, of in {**amounts, "bytes": result["bytes"]}.items():
        pairs = {f"grouped_vs_{other}": (other, "grouped 1") for other in ("plain", "dedup", "placed", "group_limited")}
        if "grouped 1" not in of:
            pairs = {f"hierarchical_vs_flat_{n}": (f"flat {n}", f"hierarchical {n}") for n in ("dedup", "placed")}
        ratios |= {f"{kind}.{name}": of[slow] / of[fast] for name, (slow, fast) in pairs.items()}
    return ratios


def compare(
    layouts: list[tuple[int, int]], bandwidths: list[str], rounds: int, train_steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train the model, then measure every layout over every bandwidth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, counted = train_moe(folder, MoEShape(), train_steps)
        for nodes, per_node in layouts:
            arms = make_arms(folder, checkpoint, counted, nodes, per_node)
            free = on_nodes(folder, arms, nodes, 1, FREE, rounds) if per_node == 1 else None
            for bandwidth in bandwidths:
                found = on_nodes(folder, arms, nodes, per_node, bandwidth, rounds)
                result = describe(found, arms)
                if free is not None:
                    result["predicted"] = predict(found, free, result, arms, folder, nodes)
                title = f"{nodes} nodes x {per_node} ranks, {bandwidth}"
                for kind in ("step", "exchange"):
                    ratios = {key: value for key, value in result["ratios"].items() if key.startswith(kind)}
                    print_table(f"{title}: {kind}", result[kind], ratios)
                yield title, result


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--bandwidths", nargs="*", default=["100mbit", "1gbit"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--no-hierarchical", action="store_true", help="leave out the 2 nodes of 2 ranks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layouts = [(nodes, 1) for nodes in args.nodes] + ([] if args.no_hierarchical else [(2, 2)])
    results: dict[str, Any] = {}
    setting = {"rounds": args.rounds, "train_steps": args.train_steps, "tokens per rank": ROWS_PER_RANK * SEQUENCE}
    setting |= {"model": MoEShape().config().model_dump(mode="json", include={"hidden_size", "num_layers", "moe"})}
    for title, result in compare(layouts, args.bandwidths, args.rounds, args.train_steps):
        results[title] = result  # written each time: the whole takes an hour, and who interrupts it keeps what there is
        write_results(args.json, __doc__.splitlines()[0], setting, results)


if __name__ == "__main__":
    main()
