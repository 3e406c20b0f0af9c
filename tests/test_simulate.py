"""`ep-engine simulate`: by hand on round rates of links and devices, its counts against torch, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ep_engine.attention import Positions
from ep_engine.c2r.profile import profile
from ep_engine.config import RunConfig
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError
from ep_engine.model import DecoderLayer
from ep_engine.model_config import read_model_config
from ep_engine.placement import Placement
from ep_engine.planning import work
from ep_engine.planning.activations import Part
from ep_engine.planning.cluster import Cluster, make_cluster, read_cluster
from ep_engine.planning.expert_traffic import Groups, Passed
from ep_engine.planning.routing_trace import choose_again, read_ids, save_trace
from ep_engine.planning.simulate import simulate
from ep_engine.planning.what_if import variants
from tests.run_cases import moe_folder, small_run
from tests.small_models import moe_checkpoint, routing_tables

Command = Callable[..., tuple[int, str, str]]
FOLDER = Path(__file__).parent.parent / "launch" / "clusters"
CLUSTERS = {path.stem: path for path in FOLDER.glob("*.toml")}
MODELLED = ["h200-ib", "h200-efa", "pcie-workstation"]
FAST = {"memory_gb": 1, **{f"{kind}_tflops": 1e6 for kind in ("dense", "experts", "attention")}, "moved_gb_per_s": 1e9}
TOKENS = 48 * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE model of 2 layers, 8 experts and top-2, its profile, and a trace with scores of its text."""
    folder = moe_folder(tmp_path_factory.mktemp("simulate"))
    found = profile(
        folder / "moe",
        TokenFile(folder / "train"),
        max_tokens=TOKENS,
        sequence_length=16,
        keep_ids=True,
        keep_scores=True,
    )
    assert found.ids_LTK is not None
    found.profile.save(folder / "own.npz")
    save_trace(folder / "trace.npz", found.ids_LTK, found.scores_LTE)
    save_trace(folder / "ids.npz", found.ids_LTK)
    return folder


def cluster_of(nodes: int = 2, per_node: int = 1, **changes: Any) -> Cluster:
    """Devices that need no time, and links of 8 Mbit/s, a byte in a microsecond, between nodes."""
    tiers = {"node": {"gbit_per_s": 0.016, "latency_us": 0}, "network": {"gbit_per_s": 0.008, "latency_us": 0}}
    shape = {"name": "made up", "origin": "measured", "nodes": nodes, "devices_per_node": per_node, "device": FAST}
    return make_cluster({**shape, **tiers, **changes}, "a test")


def run_of(folder: Path, ranks: int = 2, **sections: dict[str, Any]) -> RunConfig:
    parallel = {"expert_parallel_size": ranks, **sections.pop("parallel", {})}
    moe = {"transport": "collective", **sections.pop("moe", {})}
    return small_run(folder, "run", model={"checkpoint": str(folder / "moe")}, parallel=parallel, moe=moe, **sections)


def four_tokens(folder: Path) -> tuple[RunConfig, Path]:
    """Rank 0 has experts 0-3 and tokens 0, 1; rank 1 experts 4-7 and tokens 2, 3; messages of 32 float32."""
    ids = np.array([[[0, 4], [5, 6], [1, 2], [7, 4]], [[0, 1], [2, 3], [4, 5], [6, 7]]], np.int16)
    save_trace(folder / "four.npz", ids)
    return run_of(folder, data={"sequence_length": 1, "batch_size": 4}), folder / "four.npz"


def test_an_exchange_takes_as_long_as_the_rank_with_most_bytes(folder: Path) -> None:
    config, trace = four_tokens(folder)
    found = simulate(config, cluster_of(), trace)
    # Two rows leave rank 0 and one leaves rank 1, in layer 0; none in layer 1. A row is 128 bytes, with two slots and
    # their weights 144 on the way to the experts, and with two gradients of weights and padding 144 on its way back.
    microseconds = 2 * 144 + 2 * 128 + 2 * 128 + 2 * 144
    assert found["layers"][0]["rows_ms"] == pytest.approx(microseconds / 1e3)
    assert found["layers"][1]["rows_ms"] == 0
    assert found["rows_ms"] == found["layers"][0]["rows_ms"]
    assert found["bytes_per_token"]["network"] == pytest.approx(3 / 4 * (144 + 128 + 128 + 144))
    late = {"gbit_per_s": 0.008, "latency_us": 1000}
    slow = simulate(config, cluster_of(network=late), trace)
    # Counts and four exchanges in each direction that has one; layer 1 exchanges no row over the network.
    assert slow["rows_ms"] - found["rows_ms"] == pytest.approx(5)
    assert simulate(config, cluster_of(network={**late, "gbit_per_s": 0.004}), trace)["rows_ms"] == pytest.approx(
        2 * found["rows_ms"] + 5
    )


def test_software_and_share_make_a_byte_longer_and_devices_of_a_node_may_share(folder: Path) -> None:
    config, trace = four_tokens(folder)
    plain = simulate(config, cluster_of(), trace)["rows_ms"]
    carried = {"share": 0.5, "software_gbit_per_s": 0.008}
    tier = {"gbit_per_s": 0.008, "latency_us": 0, "rows": carried}
    assert simulate(config, cluster_of(network=tier), trace)["rows_ms"] == pytest.approx(3 * plain)
    four = run_of(folder, 4)
    alone, shared = (
        simulate(four, cluster_of(2, 2, network={"gbit_per_s": 0.008, "latency_us": 0, "shared": shared}), trace)
        for shared, trace in ((False, folder / "trace.npz"), (True, folder / "trace.npz"))
    )
    assert alone["rows_ms"] < shared["rows_ms"] <= 2 * alone["rows_ms"]


def test_a_share_of_exchanges_hides_behind_computation_but_no_more_than_there_is(folder: Path) -> None:
    config = run_of(folder)
    slow = {**FAST, "dense_tflops": 1e-6}
    whole = simulate(config, cluster_of(device=slow), folder / "trace.npz")
    half = simulate(config, cluster_of(device=slow, overlap=0.5), folder / "trace.npz")
    assert half["rows_ms"] == pytest.approx(whole["rows_ms"] / 2)
    nothing = simulate(config, cluster_of(overlap=0.5), folder / "trace.npz")
    assert nothing["rows_ms"] == pytest.approx(whole["rows_ms"], rel=1e-3)


def test_operations_of_a_layer_are_those_torch_counts(folder: Path) -> None:
    """Attention aside: torch counts all of its scores, and not on every device."""
    model = read_model_config(folder / "moe" / "model.json")
    config = run_of(folder, 1)
    part = Part(config, model, 1)
    layer = DecoderLayer(model, 0, Positions(model))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(part.rows, 16, model.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "scaled_dot_product" not in str(op))
    kept = part.layer(0, Passed(rows=part.tokens, copies=2 * part.tokens, sent=0, width=2))
    found = work.of_layer(part, 0, kept)
    # The router's products are an op of ours, which torch does not count, and so are the experts'.
    assert model.moe is not None
    gate = model.hidden_size * model.moe.num_experts + model.moe.num_experts**2
    assert found.dense - 6 * part.tokens * gate <= products <= found.dense
    experts = work.of_experts(part, Passed(rows=9, copies=10, sent=0, width=2), kept)
    assert experts.experts == 3 * 10 * 2 * 3 * model.hidden_size * model.moe.expert_hidden_size
    twice = work.of_layer(Part(run_of(folder, 1, train={"recompute": "full"}), model, 1), 0, kept)
    assert twice.dense == pytest.approx(found.dense * 4 / 3)


def test_busy_experts_make_a_tail(folder: Path, tmp_path: Path) -> None:
    slow = cluster_of(device={**FAST, "experts_tflops": 1e-6}, network={"gbit_per_s": 1e6, "latency_us": 0})
    even = np.stack([np.arange(TOKENS) % 4, 4 + np.arange(TOKENS) % 4], axis=1).astype(np.int16)
    uneven = np.stack([np.zeros(TOKENS), 1 + np.arange(TOKENS) % 3], axis=1).astype(np.int16)
    found = {}
    for name, ids_TK in (("even", even), ("uneven", uneven)):
        save_trace(tmp_path / f"{name}.npz", np.stack([ids_TK, ids_TK]))
        found[name] = simulate(run_of(folder), slow, tmp_path / f"{name}.npz")
    assert found["even"]["tail"]["over_mean"] == pytest.approx(1.0)
    assert found["uneven"]["tail"] | {"own_ms": 0} == {"rank": 0, "own_ms": 0, "over_mean": pytest.approx(2, rel=0.01)}
    assert found["uneven"]["compute_ms"] == pytest.approx(2 * found["even"]["compute_ms"], rel=1e-3)
    assert {layer["busiest_rank"] for layer in found["uneven"]["layers"]} == {0}


def test_rules_are_applied_to_the_scores_and_placements_to_the_slots(folder: Path) -> None:
    placement = Placement(devices=2, nodes=2, factors=(2,), layers=[[0, 2, 4, 6, 1, 3, 5, 7]] * 2)
    placement.save(folder / "placement.json")
    rules = ["topk", "c2r:3", "c2r_grouped:3:1", "group_limited:2:1"]
    cases = [
        simulate(config, cluster_of(), folder / "trace.npz")
        for config in variants(run_of(folder), rules, [str(folder / "placement.json")], folder / "own.npz")
    ]
    assert [case["rule"] for case in cases] == ["topk", "c2r T=3", "c2r_grouped T=3 M=1", "group_limited M=1"]
    sent = [case["bytes_per_token"]["network"] for case in cases]
    assert sent[2] < sent[0] != sent[1]
    plain = [
        simulate(config, cluster_of(), folder / "trace.npz")["bytes_per_token"]["network"]
        for config in variants(run_of(folder), ["topk", "group_limited:2:1"], ["contiguous"], None)
    ]
    assert plain[1] < plain[0] != sent[0]


def test_what_a_rule_chooses_by_the_scores_of_a_trace_is_what_its_model_chooses(folder: Path) -> None:
    tables = routing_tables("c2r")
    moe_checkpoint(folder / "constrained", folder / "dense", routing=tables)
    text = TokenFile(folder / "train")
    ran = profile(folder / "constrained", text, max_tokens=TOKENS, sequence_length=16, keep_ids=True)
    model = read_model_config(folder / "constrained" / "model.json")
    chosen = choose_again(folder / "trace.npz", read_ids(folder / "trace.npz", [8, 8], 2), model)
    assert ran.ids_LTK is not None
    same = (chosen.numpy() == ran.ids_LTK).all(axis=2).mean(axis=1)
    assert same[0] > 0.99  # 16 bits make some scores equal
    assert same[1] > 0.8  # and the second layer reads what the first has changed


def test_a_pipeline_fills_and_drains(folder: Path) -> None:
    device = {**FAST, "dense_tflops": 1e-6}
    cluster = cluster_of(2, device=device, network={"gbit_per_s": 1e6, "latency_us": 0})
    train = {"micro_batches": 4}
    parallel = {"pipeline_parallel_size": 2, "expert_parallel_size": 1}
    two = simulate(run_of(folder, parallel=parallel, train=train), cluster, folder / "trace.npz")
    one = simulate(run_of(folder, 1, train=train), cluster.changed(1, None), folder / "trace.npz")
    assert two["bubble_ms"] == pytest.approx((two["compute_ms"] + two["rows_ms"]) / 4)
    assert one["bubble_ms"] == 0
    assert one["compute_ms"] / 2 < two["compute_ms"] < one["compute_ms"]  # half of the layers, but all of the head


def test_of_many_ranks_some_are_counted(folder: Path) -> None:
    config = run_of(folder, 4, data={"batch_size": 4096}, parallel={"data_parallel_size": 4096})
    found = simulate(config, read_cluster(CLUSTERS["h200-ib"]).changed(512, None), folder / "trace.npz")
    assert (found["ranks"], found["ranks_counted"]) == (4096, 64)
    groups = Groups.of(config, 4096, 8)
    assert groups.some(64).counted() == list(range(64))
    assert groups.some(1).counted() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", MODELLED)
def test_modelled_clusters_say_that_nothing_was_validated(name: str, folder: Path) -> None:
    cluster = read_cluster(CLUSTERS[name])
    config = run_of(folder, 8, data={"batch_size": 512}, moe={"transport": "auto"})
    for nodes in (1, 2, 64):
        found = simulate(config, cluster.changed(nodes, None), folder / "trace.npz")
        assert found["step_ms"] > 0
        assert found["fits"]
        assert found["not_validated"] == [
            f"the figures of {cluster.name} are modelled and no prediction was compared with a run"
        ]


def test_measured_nodes_say_how_far_off_predictions_were() -> None:
    cluster = read_cluster(CLUSTERS["emulated-2-nodes"])
    assert cluster.origin == "measured"
    assert cluster.validated is not None
    assert 0 < cluster.validated.mean_error < 0.15
    assert set(CLUSTERS) == {*MODELLED, "emulated-2-nodes"}


def test_outside_of_the_validated_range_a_prediction_says_so(folder: Path) -> None:
    rules = ("topk", "c2r")
    validated = {"nodes": (2, 4), "network_gbit_per_s": (0.001, 0.1), "hidden_size": (32, 32), "rules": rules}
    validated |= {"mean_error": 0.07}
    cluster = cluster_of(validated=validated)
    config = run_of(folder)
    inside = simulate(config, cluster, folder / "trace.npz")
    assert (inside["validated"], inside["not_validated"], inside["mean_error"]) == (True, [], 0.07)
    eight = simulate(
        run_of(folder, 8, parallel={"tensor_parallel_size": 2}), cluster.changed(8, 1.0), folder / "trace.npz"
    )
    assert eight["not_validated"] == [
        "8 nodes, compared were 2 to 4",
        "a network of 1 Gbit/s, compared were 0.001 to 0.1",
        "parallel.tensor_parallel_size 2, compared was 1",
    ]
    other = run_of(folder, train={"dtype": "bfloat16", "recompute": "full"}, moe={"fp8_dispatch": True})
    (limited,) = variants(other, ["group_limited:2:1"], [], None)
    wide = cluster_of(validated={**validated, "hidden_size": (512, 1024)})
    assert simulate(limited, wide, folder / "trace.npz")["not_validated"] == [
        "a width of 32, compared were 512 to 1024",
        "rule group_limited, compared were topk, c2r",
        "train.dtype bfloat16, compared was float32",
        "train.recompute full, compared was none",
        "moe.fp8_dispatch True, compared was False",
    ]
    copies = simulate(run_of(folder, data={"batch_size": 8}), cluster.changed(4, None), folder / "trace.npz")
    assert copies["not_validated"] == ["several copies of an expert on 4 devices, compared was one"]


@pytest.fixture(scope="module")
def run_file(folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'[model]\ncheckpoint = "{folder}/moe"\n[data]\ntrain = "{folder}/train"\nsequence_length = 16\n'
        "batch_size = 16\n[train]\nsteps = 1\n[parallel]\nexpert_parallel_size = 8\n"
        f'[output]\nfolder = "{folder}/out"\n'
    )
    return path


def test_the_command_shows_cases_side_by_side(run: Command, folder: Path, run_file: Path) -> None:
    words = [folder / "trace.npz", "--run", run_file, "--cluster", CLUSTERS["h200-ib"]]
    status, out, err = run("simulate", *words, "--rule", "topk", "--rule", "c2r:3", "--profile", folder / "own.npz")
    assert (status, err) == (0, "")
    assert "c2r T=3" in out
    assert out.count("not validated") == 2
    status, out, _ = run("simulate", *words)
    assert "busiest rank" in out
    status, out, _ = run("simulate", *words, "--json", "--nodes", 1, "data.batch_size=8")
    found = json.loads(out)
    assert (found["cluster"]["nodes"], found["cases"][0]["ranks"]) == (1, 8)
    assert not found["cases"][0]["validated"]


REFUSED = {
    "a rule that is none": (["--rule", "c2r"], "--rule c2r is none of topk, group_limited:GROUPS:M, c2r:T or"),
    "a T out of range": (["--rule", "c2r:9", "--profile", "{folder}/own.npz"], "routing.top_t (9) must be in k-1..E-1"),
    "no lists": (["--rule", "c2r:3"], "routing.rule c2r needs routing.profile"),
    "ranks that do not fit": (["--nodes", "3"], "data.batch_size (16) must be a multiple of the 24 ranks"),
    "no cluster": (["--cluster", "{folder}/none.toml"], "cluster {folder}/none.toml cannot be read"),
    "a rate of nothing": (["--network-gbit", "0"], "network.gbit_per_s"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_sentence(name: str, run: Command, folder: Path, run_file: Path) -> None:
    more, sentence = REFUSED[name]
    given = ["--cluster", CLUSTERS["h200-ib"]] if "--cluster" not in more else []
    status, out, err = run(
        "simulate", folder / "trace.npz", "--run", run_file, *given, *(word.format(folder=folder) for word in more)
    )
    assert (status, out) == (2, "")
    assert sentence.format(folder=folder) in err
    assert err.count("\n") == 1


def test_traces_without_scores_serve_plain_top_k_alone(folder: Path, tmp_path: Path) -> None:
    config = run_of(folder)
    assert simulate(config, cluster_of(), folder / "ids.npz") == simulate(config, cluster_of(), folder / "trace.npz")
    (other,) = variants(config, ["c2r:3"], [], folder / "own.npz")
    with pytest.raises(
        UserError, match=r"not what rule c2r would choose; make it with `ep-engine profile --trace --scores`"
    ):
        simulate(other, cluster_of(), folder / "ids.npz")
    with np.load(folder / "trace.npz") as file:
        ids, scores = file["ids"], file["scores"]
    save_trace(tmp_path / "short.npz", ids, scores[:, :-1])
    with pytest.raises(UserError, match=r"finite `scores` of \(2, 768, 8\), got \(2, 767, 8\)"):
        simulate(other, cluster_of(), tmp_path / "short.npz")
    scores[0, 0, 0] = np.nan
    save_trace(tmp_path / "nan.npz", ids, scores)
    with pytest.raises(UserError, match="finite `scores`"):
        simulate(other, cluster_of(), tmp_path / "nan.npz")


def test_a_dense_model_and_links_that_are_missing_are_refused(folder: Path) -> None:
    dense = small_run(folder, "run", parallel={"data_parallel_size": 2})
    with pytest.raises(UserError, match="the run's model is dense; use `ep-engine plan`"):
        simulate(dense, cluster_of(), folder / "trace.npz")
    with pytest.raises(UserError, match=r"^a test: \[network\], its links, is needed with nodes 2; add it$"):
        cluster_of(network=None)
    with pytest.raises(UserError, match=r"^a test: \[node\], its links, is needed with devices_per_node 2; add it$"):
        cluster_of(per_node=2, node=None)
    with pytest.raises(UserError, match="bandwidth"):
        make_cluster({**cluster_of().model_dump(), "bandwidth": 3}, "a test")
