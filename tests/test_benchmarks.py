"""The benchmarks run, compare the same thing, and write what RESULTS.md needs."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.all_to_all import rows_to_send
from benchmarks.c2r import draw, over_seeds, verdicts
from benchmarks.construction import assignments, graph, inertia_of_directions, ours, rows
from benchmarks.kernels import choice_calls, move_calls, plan_calls
from benchmarks.nodes import gbit
from benchmarks.rates import KINDS, MESSAGE, REPEATS, LinkTimes, moved_by, shared_rows, tier_of, to_toml
from benchmarks.scaling import CLUSTER, on_gpus
from benchmarks.timing import time_in_turn
from checkpoint_tools.balanced_kmeans import balanced_kmeans
from ep_engine.planning.cluster import Tier, read_cluster

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *command: str) -> dict[str, Any]:
    out = tmp_path / "results.json"
    line = [sys.executable, "-m", *command, "--rounds", "2", "--json", str(out)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}  # a machine's own name need not resolve
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    assert {"question", "setting", "machine", "commit", "date", "results"} <= document.keys()
    return document


def test_calls_take_turns_and_are_warmed_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    found = time_in_turn(calls, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert all(times["min_ms"] <= times["median_ms"] <= times["max_ms"] for times in found.values())


@pytest.mark.slow
def test_layer_benchmark_compares_equal_outputs_and_names_what_is_left_out(tmp_path: Path) -> None:
    line = (
        "--shapes",
        "quarter",
        "--tokens",
        "64",
        "--ep",
        "2",
        "--peers",
        "deepspeed",
        "--peers-python",
        "/none/python",
        "--turns",
        "1",
    )
    found = run(tmp_path, "benchmarks.moe_layer", *line)["results"]["quarter"]
    assert {"ours ep1", "ours ep2 collective", "ours ep2 shared_memory", "dense"} <= found["times"].keys()
    assert {"transformers eager", "transformers grouped_mm", "transformers batched_mm"} <= found["times"].keys()
    assert found["left_out"] == ["deepspeed: there is no /none/python"]
    assert found["ratios"]["activation_memory_vs_transformers"] > 0
    assert found["activation_bytes"]["ours ep1"]["held"] <= found["activation_bytes"]["ours ep1"]["peak"]


def test_all_to_all_benchmark_compares_equal_messages(tmp_path: Path) -> None:
    line = ("--ranks", "2", "--mebibytes", "0.25")
    results = run(tmp_path, "benchmarks.all_to_all", *line)["results"]
    assert list(results) == ["2 ranks, 0.25 MiB, even", "2 ranks, 0.25 MiB, skewed"]
    for found in results.values():
        assert found["ratios"].keys() == {"shared_memory_vs_gloo", "vs_nt_memcpy", "pack_to_expand_vs_gloo"}


def test_skewed_messages_are_as_many_bytes() -> None:
    for size, skewed in product((2, 4), (False, True)):
        rows = [rows_to_send(rank, size, 1000, skewed) for rank in range(size)]
        assert all(sum(sent) == 1000 and sent[rank] == 0 for rank, sent in enumerate(rows))
    assert rows_to_send(0, 4, 900, True)[1] == 600


def test_kernel_benchmark_compares_the_same_work() -> None:
    """Each call once, but not the compiled ones, whose compilation takes a minute; the choices are compared inside."""
    logits_TE = torch.randn(64, 64)
    ids_TK = logits_TE.topk(8, dim=1).indices
    calls = {**move_calls(ids_TK, 64, torch.bfloat16), **plan_calls(ids_TK, 64), **choice_calls(logits_TE)}
    for name, call in calls.items():
        if "compiled" not in name:
            call()
    order, counts = calls["plan torch"]()
    grouped = calls["group"]()
    assert torch.equal(grouped.copy_row_N.long(), order // 8)
    assert torch.equal(grouped.rows_per_slot_L.long(), counts)


def test_dispatch_benchmark_counts_fewer_bytes_per_device(tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.bench_dispatch")
    results = run(tmp_path, *torchrun, "--tokens", "64", "--hidden", "16", "--experts", "16")["results"]
    for top_k in (4, 8):
        one, many = (results[f"top-{top_k} {name}"]["bytes_per_token"] for name in ("per_device", "per_expert"))
        assert one < many


IN_THE_TEXT = [
    "kernels", "all_to_all", "moe_layer", "moe_layer_bf16", "moe_layer_llama", "overlap", "dispatch", "nodes",
    "quickstart",
]  # fmt: skip


@pytest.mark.parametrize("name", IN_THE_TEXT)
def test_results_in_the_text_are_those_of_the_files(name: str) -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    if name == "quickstart":
        for arm, figures in document["arms"].items():
            row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
            assert f"| {figures['heldout_loss']:.4f} | {figures['bytes_per_token']:.0f} |" in row
        return
    for found in document["results"].values():
        for ratio in found.get("ratios", {}).values():
            assert re.search(rf"\| ({ratio:.2f}|{ratio:.1f}) \|", text), ratio
        for times in found.get("times", {} if name == "nodes" else {"": found}).values():
            spreads = [
                f"{times['median_ms']:.{n}f} ({times['min_ms']:.{n}f}, {times['max_ms']:.{n}f})" for n in (0, 1, 2)
            ]
            if name in (
                "moe_layer",
                "moe_layer_bf16",
                "moe_layer_llama",
                "dispatch",
            ):  # the others show the op and how much faster it is
                assert any(f"| {spread} |" in text for spread in spreads)


def test_the_study_in_the_text_is_that_of_the_file() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    document = json.loads((ROOT / "benchmarks/results/study.json").read_text())
    assert f"`launch/study.sh --seeds {document['setting']['seeds']}` at {document['commit']}" in text
    for arms in document["results"]["means"].values():
        for name, found in arms.items():
            end, start = found["end"], found["start"]["mean"]
            row = f"| {start:.4f} | {end['mean']:.4f} ({end['least']:.4f}, {end['largest']:.4f}) |"
            assert row in text, name
            if arms is document["results"]["means"]["rules"]:
                row = f"| {found['bytes']['mean']:.0f} | {found['devices']['mean']:.3f} | {found['load']['mean']:.2f} |"
                assert row in text, name


def test_condensing_in_the_text_is_that_of_the_file() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    document = json.loads((ROOT / "benchmarks/results/condense.json").read_text())
    assert f"results/condense.json` at {document['commit']}" in text
    found = document["results"]["search"]["experts"]
    assert f"{found['search_speedup']:.0f} times (asked: 20), {found['forward_passes_ratio']:.0f} forwards" in text
    assert found["same_choices"]
    for name, point in document["results"]["curve"].items():
        losses = f"| {point['heldout_loss']:.4f} | {point['heldout_loss_tuned']['all']:.4f} |"
        speed = f"| {point['bytes_per_token']:.0f} | {point['tokens_per_second']['median']:.0f} |"
        arm = name.rpartition(", ")[0] or name
        rows = [row for row in text.splitlines() if row.startswith(f"| {arm} |")]
        assert any(losses in row and speed in row for row in rows), name


def test_placements_and_watching_in_the_text_are_those_of_the_files() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    placed, watched, step = (
        json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())["results"]
        for name in ("placement", "watch", "train_step")
    )
    measured = (
        "placement",
        "placement_trained",
        "watch",
        "train_step",
        "c2r",
        "nodes_predicted",
        "construction",
        "convert",
        "scaling_gpus",
    )
    for name in measured:
        commit = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())["commit"]
        command = text[text.index(f"results/{name}.json") :]
        assert re.match(rf"results/{name}.json[^`]*`\s+at\s+{commit}", command), (name, commit)
    noisy = [found for name, found in placed.items() if name.startswith("noisy")]
    assert len(noisy) == 8
    for found in noisy:
        metis = found["metis"]
        row = f"{found['contiguous']:.4f} | {found['ours']:.4f} | {metis['inside']:.4f} ({metis['layers_no_worse']}) |"
        assert row in text
    for found in (found for name, found in placed.items() if name.startswith("large")):
        assert f"| {found['ours']['devices']:.3f}, {found['ours']['nodes']:.3f} |" in text
    assert f"{(watched['watch']['ratios']['timed_inside'] - 1):.2%}".replace("%", " % of a step") in text
    for name, arm in json.loads((ROOT / "benchmarks/results/c2r.json").read_text())["results"]["arms"].items():
        losses = f"{arm['loss']:.4f} ({arm['loss_min']:.4f}, {arm['loss_max']:.4f})"
        assert f"| {name} | {losses} | {arm['bytes']:.0f} |" in text
    document = json.loads((ROOT / "benchmarks/results/nodes_predicted.json").read_text())
    for title, one in document["results"].items():
        nodes, rate = title.split(" nodes")[0], title.split(", ")[1]
        for name, predicted in one["predicted"]["calibrated at 300mbit"].items():
            if name in one["step"]:
                seconds = one["step"][name]["median_ms"] / 1e3, predicted["step_ms"] / 1e3
                assert f"| {nodes} | {rate} | {name} | {seconds[0]:.2f} | {seconds[1]:.2f} |" in text
    for name, found in step["times"].items():
        spread = [f"{found[key] / 1e3:.2f}" for key in ("median_ms", "min_ms", "max_ms")]
        assert f"| {name} | {spread[0]} ({spread[1]}, {spread[2]}) |" in text


def test_construction_is_measured_on_the_same_rows_and_scores() -> None:
    found = assignments(64, 4)
    assert found["exact"]["sum_of_scores"] >= found["greedy"]["sum_of_scores"] - 1e-6  # added up in another order
    grouped, noise = (ours(640, 64, 4, signal, "l2")["inertia"] for signal in (2.0, 0.0))
    assert 0 < grouped < noise < 640  # rows have length one
    x_ND = rows(640, 64, 4, 2.0)
    clusters = balanced_kmeans(x_ND, 4, metric="cos")
    assert inertia_of_directions(x_ND.numpy(), clusters.label_N, 4) == pytest.approx(clusters.inertia, rel=1e-4)
    cut = graph(64, 4, tokens=256)
    assert (cut["sizes_exact"], cut["groups_found"]) == (1, 1)
    assert cut["entries"] <= 64 * 63


def test_a_tier_is_made_of_two_rates() -> None:
    """Exchanges that get 0.8 of a link, and a bit of software at 2 Gbit/s; a message of few bytes takes 1 ms."""
    bits = 8 * MESSAGE * 3

    def times(gbit: float) -> LinkTimes:
        ms = 1 + bits * (1 / (0.8 * gbit) + 1 / 2) * 1e-6
        calls = {"few": 1.0, **dict.fromkeys(KINDS.values(), ms)}
        return LinkTimes({f"link {name}": [REPEATS * one] for name, one in calls.items()}, ranks=4)

    tier = Tier(**tier_of(0.3, times(0.3), 10.0, times(10.0)))
    assert (tier.gbit_per_s, tier.latency_us) == (0.3, 1000)
    for kind in KINDS:
        carried = getattr(tier, kind)
        assert (carried.share, carried.software_gbit_per_s) == (pytest.approx(0.8), pytest.approx(2.0))
    assert gbit("300mbit") == 0.3
    assert gbit("10gbit") == 10


def test_rates_are_read_from_results_of_other_benchmarks() -> None:
    kernels, exchanged = (
        json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text()) for name in ("kernels", "all_to_all")
    )
    gathered = kernels["results"]["E=64 float32"]["times"]["gather"]["median_ms"]
    assert moved_by(kernels, 2) == pytest.approx(
        16384 * 8 * 2048 * 4 / gathered * 1e-6
    )  # twice the bytes, half a machine
    tier = Tier(gbit_per_s=100, **shared_rows(exchanged, 2, 100))
    for size in (1, 64):
        ms = exchanged["results"][f"2 ranks, {size} MiB, even"]["times"]["exchange shared_memory"]["median_ms"]
        assert tier.ms("rows", size << 20) + tier.latency_us / 1e3 == pytest.approx(ms, rel=0.05)


def test_a_cluster_is_written_as_it_is_read(tmp_path: Path) -> None:
    cluster = read_cluster(CLUSTER)
    (tmp_path / "c.toml").write_text(to_toml(cluster))
    assert read_cluster(tmp_path / "c.toml") == cluster


def test_what_is_foretold_of_gpus_grows_with_the_network(tmp_path: Path) -> None:
    one, eight = on_gpus(tmp_path, 8), on_gpus(tmp_path, 64)
    assert (one["ep"], eight["ep"]) == (8, 64)
    # 28 layers, there and back twice; of 7 others 1 - C(56, 6) / C(64, 6) are met by a token; words behind a row
    rows = 28 * 4 * 7 * (1 - 0.43302) * 2048 * 2 / 1e3
    assert one["node_kb_a_token"] == pytest.approx(rows, rel=0.03)
    assert one["network_kb_a_token"] == 0 < eight["network_kb_a_token"]
    assert eight["tokens_per_s"] < one["tokens_per_s"]
    assert one["compute_ms"] == pytest.approx(eight["compute_ms"], rel=0.1)


def arm(losses: list[float], num_bytes: float) -> dict[str, Any]:
    run = {"bytes": num_bytes, "devices": 1.0, "bytes_by_tier": {"node": num_bytes, "network": 0.0}}
    return over_seeds([{"loss": loss, **run} for loss in losses])


def test_an_arm_is_told_from_the_placement_seed_by_seed() -> None:
    arms = {
        "placed": arm([2.0, 3.0, 2.5], 100.0),
        "c2r 4": arm([2.1, 3.2, 2.6], 80.0),  # worse for every seed, though the seeds differ by more
        "c2r 8": arm([2.1, 2.9, 2.6], 60.0),
        "grouped 1": arm([1.9, 2.9, 2.4], 100.0),
    }
    assert (arms["c2r 4"]["loss_min"], arms["c2r 4"]["loss_max"]) == (2.1, 3.2)
    assert arms["placed"]["bytes_by_tier"] == {"node": 100.0, "network": 0.0}
    assert verdicts(arms) == {
        "c2r 4": "costs +0.1333 nats, 20% fewer bytes than placement alone",
        "c2r 8": "its loss is not distinguishable, 40% fewer bytes than placement alone",
        "grouped 1": "costs -0.1000 nats, 0% fewer bytes than placement alone: it does not pay",
    }


def test_the_picture_of_loss_against_bytes_is_one(tmp_path: Path) -> None:
    draw(tmp_path / "p.png", {"placed": arm([2.0, 3.0], 100.0), "c2r 4": arm([2.1, 3.2], 80.0)})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
