"""The predicted bytes of experts: by hand, and equal to the ledgers of real steps with the same routing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.config import RunConfig
from ep_engine.errors import UserError
from ep_engine.load_balance import RouterStatistics
from ep_engine.mesh import World, process_groups
from ep_engine.placement import Placement
from ep_engine.planning.expert_traffic import ExpertTraffic, Groups, Passed, count_traffic, transport_of
from ep_engine.resolve import resolve, resolve_layout
from ep_engine.stages import Stages
from ep_engine.training.trainer import Trainer
from tests.counts import random_profile
from tests.distributed import run_ranks
from tests.run_cases import moe_model, small_run, write_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a MoE model of 2 layers, 8 experts and top-2, its profile, and placements of it."""
    folder = write_text(tmp_path_factory.mktemp("traffic"))
    moe_model(folder)
    random_profile(2, 8, seed=0).save(folder / "profile.npz")
    slots = [[0, 7, 1, 6, 2, 5, 3, 4], [0, 2, 4, 6, 1, 3, 5, 7]]
    Placement(devices=4, nodes=2, factors=(2, 2), layers=slots).save(folder / "placement.json")
    return folder


def moe_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return small_run(folder, "run", **{"model": {"checkpoint": str(folder / "moe")}, **sections})


def traffic_of(config: RunConfig, world_size: int, ids_LNK: Tensor, ranks_per_node: int | None = None) -> ExpertTraffic:
    layout = resolve_layout(config, world_size, config.model.checkpoint, ranks_per_node=ranks_per_node)
    assert layout.placement is not None
    groups = Groups.of(config, world_size, ranks_per_node or world_size)
    return count_traffic(config, layout.stages, layout.placement, groups, ids_LNK, layout.model)


def test_four_tokens_on_two_ranks_by_hand(folder: Path) -> None:
    # rank 0 has experts 0-3 and tokens 0, 1; rank 1 experts 4-7 and tokens 2, 3; messages of 32 float32
    config = moe_run(folder, data={"sequence_length": 1, "batch_size": 4}, parallel={"expert_parallel_size": 2})
    ids = torch.tensor([[[0, 4], [5, 6], [1, 2], [7, 3]], [[0, 1], [2, 3], [4, 5], [6, 7]]])

    found = traffic_of(config, 2, ids)

    row, slots = 32 * 4, 2 * 2 * 4  # a row; two slots and their weights
    assert found.ledgers[0].sent[0, "dispatch", "node"] == 2 * (row + slots)  # tokens 0 and 1 to rank 1
    assert found.ledgers[0].sent[0, "dispatch", "self"] == row + slots  # token 0 stays for expert 0
    assert found.ledgers[1].sent[0, "dispatch", "node"] == 2 * (row + slots)  # tokens 2 and 3 to rank 0
    assert found.ledgers[0].sent[0, "combine", "node"] == 2 * row  # back to tokens 2 and 3
    assert found.ledgers[0].sent[0, "combine_backward", "node"] == 2 * row
    assert found.ledgers[1].sent[0, "dispatch_backward", "node"] == 2 * (row + slots // 2 + 8)  # to 16 bytes
    assert {tier: found.ledgers[0].sent[1, "dispatch", tier] for tier in ("self", "node")} == {
        "self": 2 * (row + slots),
        "node": 0,
    }
    assert found.passed[0, 0, 0] == Passed(rows=3, copies=4, sent=2, width=2)  # token 0, 2 and 3 of experts 0, 1, 2, 3
    assert found.passed[1, 1, 0] == Passed(rows=2, copies=4, sent=0, width=2)
    assert dict(found.ledgers[1].tokens) == {0: 2, 1: 2}


# Ranks, ranks of a node, and what is set.
RUNS: dict[str, tuple[int, int, dict[str, dict[str, Any]]]] = {
    "one process": (1, 1, {}),
    "ep2": (2, 2, {"parallel": {"expert_parallel_size": 2}}),
    "ep2 per expert, 8 bits": (
        2,
        1,
        {"parallel": {"expert_parallel_size": 2}, "moe": {"combine": "per_expert", "fp8_dispatch": True}},
    ),
    "ep2 fixed rows in parts, bfloat16": (
        2,
        2,
        {
            "parallel": {"expert_parallel_size": 2},
            "moe": {"fixed_rows": 64},
            "train": {"micro_batches": 2, "dtype": "bfloat16"},
        },
    ),
    "tp2 ep2 placed": (
        2,
        2,
        {
            "parallel": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
            "moe": {"placement": "{folder}/placement.json"},
        },
    ),
    "ep2 etp2 c2r": (
        4,
        4,
        {
            "parallel": {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
            "routing": {"rule": "c2r", "top_t": 3, "profile": "{folder}/profile.npz"},
        },
    ),
    "ep4 over nodes": (
        4,
        2,
        {
            "parallel": {"expert_parallel_size": 4},
            "moe": {"placement": "{folder}/placement.json", "transport": "hierarchical", "fp8_dispatch": True},
        },
    ),
    "ep2 pyramid": (
        2,
        2,
        {"model": {"checkpoint": "{folder}/pyramid"}, "parallel": {"expert_parallel_size": 2}},
    ),
    "edp2 ep2 computed again": (4, 2, {"parallel": {"expert_parallel_size": 2}, "train": {"recompute": "full"}}),
    "one process with a capacity": (1, 1, {"balance": {"capacity_factor": 0.5}}),
    "edp2 ep2 with a capacity, in parts": (
        4,
        4,
        {
            "parallel": {"expert_parallel_size": 2},
            "balance": {"capacity_factor": 0.75},
            "train": {"micro_batches": 2, "recompute": "full"},
        },
    ),
    "ep2 fixed rows with a capacity": (
        2,
        2,
        {
            "parallel": {"expert_parallel_size": 2},
            "moe": {"fixed_rows": 64},
            "balance": {"capacity_factor": 0.5},
        },
    ),
    "pp2 ep2 zbv": (
        4,
        4,
        {
            "model": {"checkpoint": "{folder}/deep"},
            "parallel": {"pipeline_parallel_size": 2, "expert_parallel_size": 2, "pipeline_schedule": "zbv"},
            "train": {"micro_batches": 4},
        },
    ),
}


def filled(sections: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in section.items()}
        for name, section in sections.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_trace_of_a_step_predicts_its_ledgers(name: str, folder: Path, tmp_path: Path) -> None:
    world_size, per_node, sections = RUNS[name]
    for kind, (old, new) in OTHERS.items():
        if kind in str(sections):
            other_model(folder / kind, folder / "moe", old, new)
    config = moe_run(folder, **filled(sections, folder))
    run_ranks(_trace_step, config, per_node, tmp_path, world_size=world_size)
    traces = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    layout = resolve_layout(config, world_size, config.model.checkpoint, ranks_per_node=per_node)
    tokens = config.data.batch_size * config.data.sequence_length
    numbers = torch.arange(tokens)
    ids_LNK = torch.full((layout.model.num_layers, tokens, 2), -1)
    groups = Groups.of(config, world_size, per_node)
    for rank, (of_layer, _, _) in enumerate(traces):
        mine = groups.own_tokens(config, rank, numbers.view(1, -1, 1))[0].flatten()
        for layer, ids in of_layer.items():
            ids_LNK[layer, mine] = torch.cat(ids)
    assert (ids_LNK >= 0).all()

    found = traffic_of(config, world_size, ids_LNK, per_node)

    for rank, (_, sent, tokens_of_layer) in enumerate(traces):
        assert found.ledgers[rank].sent == sent, rank
        assert found.ledgers[rank].tokens == tokens_of_layer


OTHERS = {
    "deep": ('"num_layers": 2', '"num_layers": 4'),
    "pyramid": ('"experts_of_layer": null', '"experts_of_layer": [4, 8]'),
}


def other_model(folder: Path, like: Path, old: str, new: str) -> None:
    """A model.json with something else in it; weights are not read."""
    folder.mkdir(exist_ok=True)
    text = (like / "model.json").read_text()
    assert old in text
    (folder / "model.json").write_text(text.replace(old, new))


def _trace_step(rank: int, world_size: int, config: RunConfig, per_node: int, results: Path) -> None:
    run = replace(resolve(config, world_size, ranks_per_node=per_node), checkpoint=None)
    dist.barrier()
    parallel = config.parallel
    world = World(rank, world_size, rank % per_node, per_node, rank // per_node)
    sizes = {"tp_size": parallel.tensor_parallel_size, "pp_size": parallel.pipeline_parallel_size}
    etp = parallel.expert_tensor_parallel_size
    with process_groups(world, CPU, parallel.expert_parallel_size, 60.0, etp_size=etp, **sizes) as meshes:
        trainer = Trainer(run, meshes, CPU)
        of_layer: dict[int, list[Tensor]] = {}

        def trace(x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
            for layer, router in routers.items():
                of_layer.setdefault(layer, []).append(router.ids_TK)
            return trainer.watch(x, routers)

        for stage in trainer.stages:
            stage.watch = trace
        trainer.one_step()
        ledger = trainer.ledger
        torch.save((of_layer, dict(ledger.sent), dict(ledger.tokens)), results / f"{rank}.pt")
        dist.barrier()


def test_a_capacity_drops_rows(folder: Path) -> None:
    # tokens 0 and 1 on rank 0, 2 and 3 on rank 1; all of experts 4 and 5; one choice of an expert is served
    data = {"sequence_length": 1, "batch_size": 4}
    capacity = {"capacity_factor": 1.0}
    config = moe_run(folder, data=data, parallel={"expert_parallel_size": 2}, balance=capacity)
    found = traffic_of(config, 2, torch.tensor([4, 5]).expand(2, 4, 2))
    assert found.passed[1, 0, 0] == Passed(rows=1, copies=2, sent=0, width=2)
    assert found.passed[0, 0, 0] == Passed(rows=0, copies=0, sent=1, width=2)


def test_more_rows_than_are_fixed_are_refused(folder: Path) -> None:
    config = moe_run(folder, parallel={"expert_parallel_size": 2}, moe={"fixed_rows": 3})
    with pytest.raises(UserError, match=r"moe.fixed_rows \(3\) is less than the 64 rows that layer 0 has .*raise it"):
        traffic_of(config, 2, torch.tensor([0, 7]).expand(2, 128, 2))


@pytest.mark.parametrize(
    ("wanted", "device", "per_node", "expected"),
    [
        ("auto", "cpu", 4, "shared_memory"),
        ("auto", "cuda", 4, "collective"),
        ("auto", "cpu", 2, "hierarchical"),
        ("auto", "cpu", 3, "collective"),
        ("collective", "cpu", 4, "collective"),
    ],
)
def test_the_transport_is_that_which_a_run_takes(
    wanted: str, device: str, per_node: int, expected: str, folder: Path
) -> None:
    config = moe_run(folder, parallel={"expert_parallel_size": 4, "device": device}, moe={"transport": wanted})
    placement = Placement.contiguous(8, 4, 2)
    assert transport_of(config, Groups.of(config, 4, per_node), placement) == expected
    alone = moe_run(folder)
    assert transport_of(alone, Groups.of(alone, 4, per_node), placement) == "none"


def test_groups_are_those_of_the_two_grids(folder: Path) -> None:
    parallel = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 4}
    groups = Groups.of(moe_run(folder, parallel=parallel), 8, 4)
    assert groups.around(5, "tp") == [4, 5]
    assert groups.around(5, "dp") == [5, 7]
    assert groups.around(5, "pp") == [1, 5]
    assert groups.around(5, "stage") == groups.around(5, "ep") == groups.around(5, "dispatch") == [4, 5, 6, 7]
    assert groups.around(5, "edp") == groups.around(5, "etp") == [5]
    assert [groups.tier(5, other) for other in (5, 4, 1)] == ["self", "node", "network"]
    assert Stages.of(2, 2, "1f1b").on(1) == [1]
