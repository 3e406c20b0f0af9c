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
from benchmarks.kernels import choice_calls, move_calls, plan_calls
from benchmarks.nodes import CALIBRATION, KINDS, REPEATS, Links
from benchmarks.scaling import GPU, MODEL, active_weights, on_gpus
from benchmarks.timing import time_in_turn

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


def test_rows_between_nodes_take_as_long_as_the_fullest_rank() -> None:
    """A message of few bytes takes 1 ms, and 1000 bytes take 1 ms more."""
    once_ms = {"link few": 1.0, **{f"link {kind}": CALIBRATION / 1000 + 1 for kind in KINDS}}
    times_ms = {link: [REPEATS * ms] for link, ms in once_ms.items()}
    links = Links(times_ms, nodes=2)
    assert links.megabits() == dict.fromkeys(KINDS, pytest.approx(8.0))
    # Rank 0 dispatches 3000 bytes and 1000 come to it; half as many go back.
    layer = [[3000, 1000], [500, 1500]]
    assert links.rows_ms(layer + layer) == pytest.approx(1 + 2 * ((1 + 3) + (1 + 1.5)))
    one_way = [[0, 2000], [2000, 0]]
    assert links.rows_ms(one_way + one_way) == pytest.approx(1 + 4 * (1 + 2))


def test_the_modelled_step_is_the_sum_that_the_benchmark_says(tmp_path: Path) -> None:
    attention, shared, chosen = 4 * 2048**2, 3 * 2048 * 2816, 6 * 3 * 2048 * 1408
    by_hand = 28 * (attention + shared + chosen + 64 * 2048 + 2 * 2048) + 2048 + 102_400 * 2048
    assert active_weights(MODEL) == by_hand
    found = on_gpus(tmp_path, 8)
    assert found["compute_ms"] == pytest.approx(6 * by_hand * GPU["tokens"] / (0.4 * 989e12) * 1e3)
    assert found["network_gb"] == 0  # one node
    # 28 layers, there and back twice, of 16384 tokens to the 7 others: 1 - C(56, 6) / C(64, 6) of them
    rows = 28 * 4 * GPU["tokens"] * 7 * (1 - 0.43302)
    assert found["nvlink_gb"] == pytest.approx(rows * 2048 * 2 / 1e9, rel=0.03)  # and the words behind a row
    total = sum(found[part] for part in ("compute_ms", "rows_ms", "dense_ms"))
    assert found["tokens_per_s"] == pytest.approx(GPU["tokens"] / total * 1e3)


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
