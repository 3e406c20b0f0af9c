"""The same bits on 1, 2 and 4 ranks, and a ledger that says what the receivers counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.transport import Alone, Collective
from tests.distributed import run_ranks
from tests.moe_cases import D, make_layer, set_routing

T, E, K, DEVICES = 90, 10, 3, 4  # 10 experts on 4 devices: two devices have an empty slot
TOKENS = {1: [T], 2: [37, 53], 4: [37, 0, 33, 20]}  # uneven on purpose, one rank has none


class Counting(Collective):
    """Counts at the receiver what came from other ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.bytes_from_others: dict[str, int] = {}

    def exchange(self, rows: Tensor, send_rows: list[int], recv_rows: list[int], where: str) -> Tensor:
        received = super().exchange(rows, send_rows, recv_rows, where)
        foreign = sum(n for rank, n in enumerate(recv_rows) if rank != self.rank)
        direction = where.split()[0]
        self.bytes_from_others[direction] = self.bytes_from_others.get(direction, 0) + received[:foreign].nbytes
        return received


ROUTINGS = {
    "learned": None,
    "all to one rank": torch.tensor([[6, 0, 3]] * T),  # the experts of the first device
    "expert 9 idle": torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:3] for i in range(T)]),
}


def run_layer(rank: int, world_size: int, dtype: torch.dtype, routing: str, mode: bool, folder: Path) -> None:
    """Forward and backward on this rank's tokens of one global problem; the results go to a file."""
    transport = Counting(dist.group.WORLD) if world_size > 1 else Alone()
    tiers = ["self" if r == rank else "node" for r in range(world_size)]
    layer = make_layer(E, K, DEVICES, transport=transport, dtype=dtype, one_row_per_copy=mode, tiers=tiers)
    generator = torch.Generator().manual_seed(1)
    x_TD, grad_TD = (torch.randn(T, D, generator=generator).to(dtype) for _ in range(2))
    first = sum(TOKENS[world_size][:rank])
    mine = slice(first, first + TOKENS[world_size][rank])
    ids_TK = ROUTINGS[routing]
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
        "arrived": layer.experts.w_up.grad.abs().sum().item() > 0,
        "ledger": layer.link.ledger.gathered(dist.group.WORLD if world_size > 1 else None).to_json(),
        "received": getattr(transport, "bytes_from_others", {}),
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


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_two_and_four_ranks_give_the_same_bits(dtype: torch.dtype, routing: str, tmp_path: Path) -> None:
    for world_size in TOKENS:
        run_ranks(run_layer, dtype, routing, False, tmp_path, world_size=world_size)
    one, _ = results(tmp_path, 1)
    assert one["y"].abs().max() > 0.1
    for world_size in (2, 4):
        other, parts = results(tmp_path, world_size)
        if routing == "all to one rank":
            assert [part["arrived"] for part in parts] == [True] + [False] * (world_size - 1)
        for name in ("y", "grad_x", "grad_weights"):
            assert torch.equal(one[name], other[name]), (world_size, name)
        assert one["experts"].keys() == other["experts"].keys() == set(range(E))
        for expert, grads in one["experts"].items():
            assert all(torch.equal(a, b) for a, b in zip(grads, other["experts"][expert], strict=True)), expert


def test_one_row_per_copy_gives_the_same_bits_too(tmp_path: Path) -> None:
    for world_size in TOKENS:
        run_ranks(run_layer, torch.bfloat16, "learned", True, tmp_path, world_size=world_size)
    one, _ = results(tmp_path, 1)
    for world_size in (2, 4):
        other, _ = results(tmp_path, world_size)
        assert all(torch.equal(one[name], other[name]) for name in ("y", "grad_x", "grad_weights"))


@pytest.mark.parametrize("mode", [False, True], ids=["per_device", "per_expert"])
def test_the_ledger_is_what_the_receivers_counted(mode: bool, tmp_path: Path) -> None:
    run_ranks(run_layer, torch.float32, "learned", mode, tmp_path, world_size=4)
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
    row_bytes = layer["bytes"]["combine"]["node"] // rows["sent"]["node"]
    assert row_bytes == D * 4
    words = 4 if mode else 8 * K  # slots, and weights where they travel
    assert layer["bytes"]["dispatch"]["node"] == rows["sent"]["node"] * (row_bytes + words)
