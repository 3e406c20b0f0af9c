"""The same bits on 1, 2, 4 and 8 ranks and over every transport, and a ledger that says what the receivers counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.errors import Fault
from ep_engine.transports.transport import Collective
from tests.distributed import run_ranks
from tests.moe_cases import D, links_between, make_layer, set_routing

T, K = 90, 3
TOKENS = {1: [T], 2: [37, 53], 4: [37, 0, 33, 20], 8: [17, 0, 20, 13, 11, 9, 0, 20]}  # uneven, some have none
# Experts and devices of a placement; its tree has the prime factors of the devices: two levels, three, empty slots.
PLACEMENTS = {"10 on 4": (10, 4), "60 on 8": (60, 8)}


class Counting(Collective):
    """Counts at the receiver what came from other ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.bytes_from_others: dict[str, int] = {}

    def all_to_all(self, out: Tensor, given: Tensor, recv: Any, send: Any, where: str) -> None:
        super().all_to_all(out, given, recv, send, where)
        direction = where.split()[0]
        self.bytes_from_others[direction] = self.bytes_from_others.get(direction, 0) + out.nbytes


ROUTINGS = {
    "learned": None,
    "all to one rank": torch.tensor([[6, 0, 3]] * T),  # the experts of the first device
    "expert 9 idle": torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:3] for i in range(T)]),
}


@dataclass(frozen=True)
class Case:
    """One problem, and how it is solved."""

    placement: str = "10 on 4"
    dtype: torch.dtype = torch.float32
    routing: str = "learned"
    transport: str = "collective"
    one_row_per_copy: bool = False
    fp8: bool = False
    fixed_rows: int | None = None
    seed: int = 1


def run_layer(rank: int, world_size: int, case: Case, folder: Path) -> None:
    """Forward and backward on this rank's tokens of one global problem; the results go to a file."""
    links = links_between(case.transport, rank, world_size)
    if case.transport == "collective" and world_size > 1:
        links = (replace(links[0], transport=Counting(dist.group.WORLD)),)
    num_experts, devices = PLACEMENTS[case.placement]
    dtype = case.dtype
    layer = make_layer(
        num_experts,
        K,
        devices,
        links=links,
        rank=rank,
        dtype=dtype,
        one_row_per_copy=case.one_row_per_copy,
        fp8=case.fp8,
        fixed_rows=case.fixed_rows,
    )
    generator = torch.Generator().manual_seed(case.seed)
    x_TD, grad_TD = (torch.randn(T, D, generator=generator).to(dtype) for _ in range(2))
    first = sum(TOKENS[world_size][:rank])
    mine = slice(first, first + TOKENS[world_size][rank])
    ids_TK = ROUTINGS[case.routing]
    if ids_TK is not None:
        set_routing(layer, ids_TK[mine])
    x = x_TD[mine].clone().requires_grad_()
    weights: list[Tensor] = []
    layer.router.register_forward_hook(lambda *args: _keep_gradient(args[2].weights_TK, weights))
    y, _ = layer(x)
    y.backward(grad_TD[mine])
    here = layer.site.experts_here()
    result = {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weights": weights[0],
        "experts": {e: [p.grad[row] for p in layer.experts.parameters()] for row, e in enumerate(here) if e >= 0},
        "arrived": layer.experts.w_down.grad.abs().sum().item() > 0,
        "ledger": layer.ledger.gathered(dist.group.WORLD if world_size > 1 else None).to_json(),
        "received": getattr(links[0].transport, "bytes_from_others", {}),
    }
    torch.save(result, folder / f"{world_size}-{rank}.pt")


def _keep_gradient(weights_TK: Tensor, kept: list[Tensor]) -> None:
    weights_TK.register_hook(lambda grad: kept.append(grad.clone()))


def results(folder: Path, world_size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ranks' results put together, and each by itself."""
    parts = [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=False) for rank in range(world_size)]
    whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in ("y", "grad_x")}
    whole["grad_weights"] = torch.cat([part["grad_weights"] for part in parts])
    whole["experts"] = {e: grads for part in parts for e, grads in part["experts"].items()}
    return whole, parts


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["y"].abs().max() > 0.1
    for name in ("y", "grad_x", "grad_weights"):
        assert torch.equal(one[name], other[name]), name
    assert one["experts"].keys() == other["experts"].keys()
    for expert, grads in one["experts"].items():
        assert all(torch.equal(a, b) for a, b in zip(grads, other["experts"][expert], strict=True)), expert


def check_sizes(case: Case, sizes: Sequence[int], folder: Path) -> None:
    """One process by the plain way, and then the case on several ranks."""
    run_ranks(run_layer, case, folder, world_size=1)
    one, _ = results(folder, 1)
    assert len(one["experts"]) == PLACEMENTS[case.placement][0]
    for world_size in sizes:
        run_ranks(run_layer, case, folder, world_size=world_size)
        other, parts = results(folder, world_size)
        if case.routing == "all to one rank":
            assert [part["arrived"] for part in parts] == [True] + [False] * (world_size - 1)
        assert_same_bits(one, other)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_two_and_four_ranks_give_the_same_bits(dtype: torch.dtype, routing: str, tmp_path: Path) -> None:
    check_sizes(Case(dtype=dtype, routing=routing), (2, 4), tmp_path)


@pytest.mark.parametrize("transport", ["shared_memory", "hierarchical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_transport_gives_the_same_bits(dtype: torch.dtype, transport: str, tmp_path: Path) -> None:
    sizes = (2, 4) if transport == "shared_memory" else (4,)
    check_sizes(Case(dtype=dtype, transport=transport), sizes, tmp_path)


@pytest.mark.parametrize("transport", ["collective", "shared_memory", "hierarchical"])
def test_sixty_experts_on_eight_devices_give_the_same_bits(transport: str, tmp_path: Path) -> None:
    sizes = (2, 4, 8) if transport == "collective" else (8,)
    check_sizes(Case("60 on 8", torch.bfloat16, transport=transport), sizes, tmp_path)


@pytest.mark.parametrize("transport", ["collective", "shared_memory", "hierarchical"])
def test_one_row_per_copy_gives_the_same_bits_too(transport: str, tmp_path: Path) -> None:
    sizes = (4,) if transport == "hierarchical" else (2, 4)
    check_sizes(Case(dtype=torch.bfloat16, transport=transport, one_row_per_copy=True), sizes, tmp_path)


@pytest.mark.parametrize("transport", ["collective", "shared_memory", "hierarchical"])
def test_rows_in_eight_bits_give_the_same_bits_too(transport: str, tmp_path: Path) -> None:
    check_sizes(Case(dtype=torch.bfloat16, transport=transport, fp8=True), (4,), tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
def test_random_uneven_routings_give_the_same_bits(world_size: int) -> None:
    run_ranks(_many_routings, world_size=world_size, timeout_s=240)


def _many_routings(rank: int, world_size: int) -> None:
    """Any number of tokens on any rank, any of them to any expert: beside the same problem on one rank, worked here."""
    links = links_between("shared_memory", rank, world_size)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        sizes = torch.randint(0, 25, (world_size,), generator=generator).mul(
            torch.rand(world_size, generator=generator) < 0.8
        )
        first, total = int(sizes[:rank].sum()), int(sizes.sum())
        mine = slice(first, first + int(sizes[rank]))
        # Experts as unlike as can be: some get nearly every token, some none.
        favour_E = torch.randn(10, generator=generator) * 3
        ids_TK = (favour_E + torch.randn(total, 10, generator=generator)).topk(K, dim=1).indices
        x_TD, grad_TD = (torch.randn(total, D, generator=generator).to(dtype) for _ in range(2))
        results = []
        for here, ways in ((slice(0, total), ()), (mine, links)):
            layer = make_layer(10, K, 4, links=ways, rank=rank if ways else 0, dtype=dtype)
            set_routing(layer, ids_TK[here])
            x = x_TD[here].clone().requires_grad_()
            y, _ = layer(x)
            y.backward(grad_TD[here])
            grads = [p.grad for p in layer.experts.parameters()]
            experts = {e: [grad[row] for grad in grads] for row, e in enumerate(layer.site.experts_here()) if e >= 0}
            results.append((y.detach(), x.grad, experts))
        (y_all, grad_all, experts_all), (y_here, grad_here, experts_here) = results
        assert torch.equal(y_all[mine], y_here), seed
        assert torch.equal(grad_all[mine], grad_here), seed
        for expert, grads in experts_here.items():
            assert all(torch.equal(a, b) for a, b in zip(experts_all[expert], grads, strict=True)), (seed, expert)


@pytest.mark.parametrize("one_row_per_copy", [False, True])
@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_a_fixed_number_of_rows_gives_the_same_bits_too(
    transport: str, one_row_per_copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_DEBUG", "1")
    case = Case(dtype=torch.bfloat16, transport=transport, one_row_per_copy=one_row_per_copy, fixed_rows=90)
    check_sizes(case, (2, 4), tmp_path)


def test_the_ledger_counts_the_empty_ones_of_fixed_rows(tmp_path: Path) -> None:
    run_ranks(run_layer, Case(fixed_rows=90), tmp_path, world_size=4)
    _, parts = results(tmp_path, 4)
    (layer,) = parts[0]["ledger"]["layers"]
    assert layer["rows"]["sent"]["node"] == 4 * 3 * 90
    for direction, tiers in layer["bytes"].items():
        assert tiers["node"] == sum(part["received"][direction] for part in parts), direction


def test_more_than_the_fixed_rows_is_a_fault(tmp_path: Path) -> None:
    run_ranks(_overflow, tmp_path)


def _overflow(rank: int, world_size: int, folder: Path) -> None:
    with pytest.raises(Fault, match=r"layer 0 has \d+ rows for rank [01], moe.fixed_rows is 7; raise it"):
        run_layer(rank, world_size, Case(fixed_rows=7, routing="expert 9 idle"), folder)


@pytest.mark.parametrize("mode", [False, True], ids=["per_device", "per_expert"])
def test_the_ledger_is_what_the_receivers_counted(mode: bool, tmp_path: Path) -> None:
    run_ranks(run_layer, Case(one_row_per_copy=mode), tmp_path, world_size=4)
    _, parts = results(tmp_path, 4)
    (layer,) = parts[0]["ledger"]["layers"]
    for direction, tiers in layer["bytes"].items():
        assert tiers["node"] == sum(part["received"].get(direction, 0) for part in parts), direction
        assert tiers["network"] == 0
    assert layer["tokens"] == T
    rows = layer["rows"]
    assert rows["plain"]["node"] + rows["plain"]["self"] == T * K
    assert rows["sent"] == rows["plain" if mode else "dedup"]
    assert rows["dedup"]["node"] < rows["plain"]["node"]
    assert layer["bytes"]["combine"]["node"] == rows["sent"]["node"] * D * 4
    width = 1 if mode else K  # a slot and a weight each; a message is a multiple of 16 bytes
    assert layer["bytes"]["dispatch"]["node"] == rows["sent"]["node"] * -(-(D * 4 + 8 * width) // 16) * 16
