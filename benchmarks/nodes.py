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
another per token. A step is also predicted, by `ep-engine simulate` on a trace of other text. The cluster it is given
is calibrated by products of a layer and by exchanges of equal messages over links of one rate that no arm runs over
(--calibration), and over links of 10 Gbit/s, which hardly limit.
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

from benchmarks.nodes_rank import ROWS_PER_RANK
from benchmarks.ranks import summary
from benchmarks.rates import LinkTimes, device_rates, tier_of
from benchmarks.timing import print_table, write_results
from benchmarks.trained_moe import SEQUENCE, MoEShape, run_config, train_moe
from ep_engine.c2r.collaboration import Profile
from ep_engine.c2r.place import place
from ep_engine.machine import describe_machine, memory_gb
from ep_engine.placement import Placement
from ep_engine.planning.cluster import Cluster, make_cluster
from ep_engine.planning.simulate import simulate

ROOT = Path(__file__).resolve().parent.parent
FREE = "10gbit"  # which hardly limits
CALIBRATION_ROUNDS = 5
TOP_T = (8, 16, 32)
GROUPED_T = 32
LOAD_CAP = 1.1
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
        "train": {"steps": 1000, "learning_rate": 1e-4, "min_learning_rate": 1e-4},
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


def calibrate(folder: Path, nodes: int, per_node: int, bandwidth: str) -> Cluster:
    """Emulated nodes as a cluster: from exchanges over links of one rate, and over links that hardly limit."""
    limited, free = (
        on_nodes(folder, {}, nodes, per_node, rate, CALIBRATION_ROUNDS)["times_ms"] for rate in (bandwidth, FREE)
    )
    ranks = nodes * per_node
    raw = {
        "name": f"{nodes} emulated nodes on {describe_machine()}",
        "origin": "measured",
        "sources": ("benchmarks/nodes.py",),
        "nodes": nodes,
        "devices_per_node": per_node,
        "device": {"memory_gb": memory_gb() / ranks, **device_rates(free)},
        "network": tier_of(gbit(bandwidth), LinkTimes(limited, ranks), gbit(FREE), LinkTimes(free, ranks)),
    }
    return make_cluster(raw, "what was measured")


def gbit(bandwidth: str) -> float:
    """Gbit/s of a rate such as 100mbit."""
    return float(bandwidth[:-4]) * {"k": 1e-6, "m": 1e-3, "g": 1.0}[bandwidth[-4]]


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


def predict(folder: Path, arms: Arms, cluster: Cluster, measured: dict[str, Any]) -> dict[str, Any]:
    """The step of every arm by `ep-engine simulate`, on a trace of other text, and over what was measured."""
    predicted: dict[str, Any] = {}
    for name, sections in arms.items():
        config = run_config(folder, "arm", rows=ROWS_PER_RANK * cluster.devices, **sections)
        found = simulate(config, cluster, folder / "trace.npz")
        step, exchange = (measured[kind][name]["median_ms"] for kind in ("step", "exchange"))
        predicted[name] = {
            **{kind: found[kind] for kind in ("step_ms", "compute_ms", "rows_ms", "dense_ms")},
            "step_over_measured": found["step_ms"] / step,
            "exchange_over_measured": found["rows_ms"] / exchange,
        }
    errors = [abs(one["step_over_measured"] - 1) for one in predicted.values()]
    return predicted | {"mean_error": statistics.mean(errors), "largest_error": max(errors)}


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """Above 1 where grouped routing, or going over nodes, takes less."""
    amounts = {kind: {name: one["median_ms"] for name, one in result[kind].items()} for kind in ("step", "exchange")}
    ratios: dict[str, float] = {}
    for kind, of in {**amounts, "bytes": result["bytes"]}.items():
        pairs = {f"grouped_vs_{other}": (other, "grouped 1") for other in ("plain", "dedup", "placed", "group_limited")}
        if "grouped 1" not in of:
            pairs = {f"hierarchical_vs_flat_{n}": (f"flat {n}", f"hierarchical {n}") for n in ("dedup", "placed")}
        ratios |= {f"{kind}.{name}": of[slow] / of[fast] for name, (slow, fast) in pairs.items() if slow in of}
    return ratios


def compare(
    layouts: list[tuple[int, int]],
    bandwidths: list[str],
    rounds: int,
    train_steps: int,
    calibration: str,
    only: list[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train the model, then measure every layout over every bandwidth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, counted = train_moe(folder, MoEShape(), train_steps)
        for nodes, per_node in layouts:
            arms = make_arms(folder, checkpoint, counted, nodes, per_node)
            arms = {name: arms[name] for name in arms if not only or name in only}
            cluster = calibrate(folder, nodes, per_node, calibration) if per_node == 1 else None
            for bandwidth in bandwidths:
                found = on_nodes(folder, arms, nodes, per_node, bandwidth, rounds)
                result = describe(found, arms)
                if cluster is not None:
                    here = cluster.changed(None, gbit(bandwidth))
                    predicted = predict(folder, arms, here, result) | {"cluster": here.model_dump()}
                    result["predicted"] = {f"calibrated at {calibration}": predicted}
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
    parser.add_argument("--calibration", default="300mbit", help="the rate of links that predictions are made of")
    parser.add_argument("--arms", nargs="*", default=[], help="only these [all]")
    parser.add_argument("--no-hierarchical", action="store_true", help="leave out the 2 nodes of 2 ranks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layouts = [(nodes, 1) for nodes in args.nodes] + ([] if args.no_hierarchical else [(2, 2)])
    results: dict[str, Any] = {}
    setting = {
        "rounds": args.rounds,
        "calibration": args.calibration,
        "train_steps": args.train_steps,
        "tokens per rank": ROWS_PER_RANK * SEQUENCE,
    }
    setting |= {"model": MoEShape().config().model_dump(mode="json", include={"hidden_size", "num_layers", "moe"})}
    given = args.bandwidths, args.rounds, args.train_steps, args.calibration, args.arms
    for title, result in compare(layouts, *given):
        results[title] = result  # written each time: the whole takes an hour, and who interrupts it keeps what there is
        write_results(args.json, __doc__.splitlines()[0], setting, results)


if __name__ == "__main__":
    main()
