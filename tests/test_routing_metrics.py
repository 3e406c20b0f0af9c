"""What a line says of every layer's router: by hand, and the same on every layout as on one rank."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_engine.balance_losses import losses_of
from ep_engine.config import BalanceSection, RunConfig
from ep_engine.load_balance import router_statistics
from ep_engine.model_config import ModelConfig, read_model_config
from ep_engine.router import Routing
from ep_engine.training.routing_metrics import describe_layer, max_over_mean
from ep_engine.training.watch import RouterWatch
from tests.distributed import run_ranks
from tests.run_cases import moe_folder, small_run, train_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("runs"))


def test_a_layer_by_hand() -> None:
    # Three tokens choose two of four experts each; 1.5 is what each expert would have if all had the same.
    load_E, importance_E = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([1.5, 0.75, 0.75, 0.0])
    found = describe_layer(load_E, importance_E, torch.tensor([1.0, 0.0, 1.0, 0.0]), tokens=3.0, entropy=1.2)
    assert found["load"] == [3, 2, 1, 0]
    assert found["importance"] == [1.5, 0.75, 0.75, 0.0]
    assert found["max_violation"] == 1.0
    assert found["entropy"] == pytest.approx(1.5 * math.log(2))  # of 1/2, 1/4, 1/4, 0
    assert found["token_entropy"] == pytest.approx(0.4)
    assert (found["dropped"], found["dropped_of_expert"]) == (2, [1, 0, 1, 0])


def test_layers_of_other_widths_are_not_diluted() -> None:
    load_LE = torch.tensor([[4.0, 2.0, 0.0, 0.0], [1.0, 1.0, 2.0, 4.0]])  # the first has two experts
    assert max_over_mean(load_LE, [2, 4]) == pytest.approx((4 / 3 + 2) / 2)
    assert max_over_mean(load_LE) == pytest.approx((4 / 1.5 + 2) / 2)


def test_the_watch_counts_what_plain_sums_say(folder: Path) -> None:
    run_ranks(_count, read_model_config(folder / "moe" / "model.json"), world_size=1)


def _count(rank: int, world_size: int, model: ModelConfig) -> None:
    world = dist.group.WORLD
    assert world is not None
    kinds = losses_of(BalanceSection(switch=0.5))
    options: dict[str, Any] = {"losses": kinds, "of_rank": True, "num_parts": 2, "num_rows": 2}
    watch = RouterWatch(model, torch.device("cpu"), world, world, **options)
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(20, 8, generator=generator) for _ in range(2)] for _ in range(2)]
    for logits_LTE in parts:
        routings = [Routing(one.topk(2).indices, one.new_ones(20, 2), one) for one in logits_LTE]
        kind = (kinds["switch"][1],)
        watch(torch.zeros(1), {i: router_statistics(routing, losses=kind) for i, routing in enumerate(routings)})
    load_LE, importance_LE, dropped_LE, tokens_L, entropy_L, balance = watch.taken(dist.group.WORLD)
    for layer in range(2):
        logits_TE = torch.cat([part[layer] for part in parts]).double()
        p_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
        chosen = (logits_TE >= logits_TE.topk(2).values[:, 1:]).sum(dim=0)
        assert torch.equal(load_LE[layer], chosen.double())
        torch.testing.assert_close(importance_LE[layer], p_TE.sum(dim=0), rtol=1e-5, atol=1e-5)  # summed in float32
        torch.testing.assert_close(entropy_L[layer], -(p_TE * p_TE.log()).sum(), rtol=1e-5, atol=1e-5)
    assert tokens_L.tolist() == [40, 40]
    assert not dropped_LE.any()
    values = []
    for one in (one for part in parts for one in part):
        share_E = torch.bincount(one.topk(2).indices.flatten(), minlength=8) / 40
        values.append(float(8 * (share_E * one.softmax(dim=1).mean(dim=0)).sum()))
    assert float(balance) == pytest.approx(sum(values) / 4, rel=1e-6)
    assert all(not one.any() for one in watch.taken(dist.group.WORLD))


def first_line(config: RunConfig) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((config.output.folder / "metrics.jsonl").read_text().splitlines()[0])
    return line


LAYOUTS: dict[str, tuple[int, dict[str, int], int]] = {
    "dp2": (2, {}, 1),
    "ep2 in parts": (2, {"expert_parallel_size": 2}, 2),
    "tp2 ep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}, 1),
    "pp2 in parts": (2, {"pipeline_parallel_size": 2}, 4),
    "ep2 etp2": (4, {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}, 1),
    "pp2 tp2 ep2 in parts": (
        4,
        {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2},
        2,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_tells_of_the_same_routing(layout: str, folder: Path) -> None:
    ranks, parallel, parts = LAYOUTS[layout]
    here: dict[str, Any] = {
        "model": {"checkpoint": str(folder / "moe")},
        "train": {"steps": 2, "micro_batches": parts},
    }
    alone = small_run(folder, f"alone {layout}", **here)
    train_here(alone)
    config = small_run(folder, layout, parallel=parallel, **here)
    run_ranks(_train, config, world_size=ranks)
    expected, found = first_line(alone), first_line(config)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for one, other in zip(found["layers"], expected["layers"], strict=True):
        assert one["load"] == other["load"]
        assert sum(one["load"]) == 2 * 2 * 8 * 16  # choices of two steps
        # Sums over ranks run in another order, and so do those of the step before.
        assert one["importance"] == pytest.approx(other["importance"], rel=1e-5, abs=2e-3)
        for name in ("max_violation", "entropy", "token_entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    assert found["balance_losses"] == pytest.approx(expected["balance_losses"], rel=1e-5)
    assert found["balance_losses"]["switch"] >= 1
    assert found["load_max_over_mean"] == pytest.approx(expected["load_max_over_mean"], rel=1e-6)
    assert found["tokens_per_second_per_rank"] * ranks == pytest.approx(found["tokens_per_second"])


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank=rank, world_size=world_size)
