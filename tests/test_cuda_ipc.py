"""Two ranks on one GPU: rows arrive, memory is used again, the layer is that of one rank, a killed rank is a fault."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.errors import Fault
from ep_engine.ledger import Ledger
from ep_engine.transports.cuda_ipc import CudaIpc
from ep_engine.transports.transport import Link
from tests.distributed import run_ranks
from tests.moe_cases import D, make_layer

pytestmark = pytest.mark.gpu

T = 300


@pytest.fixture(autouse=True)
def _one_gpu_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")


def transport_here(capacity: int = 1 << 24) -> tuple[CudaIpc, torch.device]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return CudaIpc(dist.group.WORLD, 60.0, capacity, device), device


def test_rows_arrive_and_memory_is_used_again() -> None:
    run_ranks(_exchange, world_size=3)


def _exchange(rank: int, world_size: int) -> None:
    transport, device = transport_here(1 << 20)  # for a small part of what is sent
    order = [*(p for p in range(world_size) if p != rank), rank]
    for turn in range(100):
        send_rows = [(rank + p + turn) % 3 * 100 for p in range(world_size)]
        counts = torch.tensor(send_rows, dtype=torch.int32, device=device)[:, None]
        recv_rows = transport.exchange_counts(counts, "counts")[:, 0].tolist()
        exchange = transport.begin(send_rows, recv_rows, 256, device, "rows")
        values = [16 * turn + 4 * rank + p for p in order for _ in range(send_rows[p])]
        given = torch.tensor(values, dtype=torch.int32, device=device)[:, None].expand(-1, 64)
        for part, out in exchange.parts:
            out.copy_(given[part].contiguous().view(torch.uint8))
        received = exchange.finish().view(torch.int32)
        expected = [16 * turn + 4 * p + rank for p in order for _ in range(recv_rows[p])]
        assert received[:, 0].tolist() == expected
        assert torch.equal(received[:, 63], received[:, 0])


def on_tokens(layer: torch.nn.Module, mine: slice, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD, grad_TD = (torch.randn(T, D, generator=generator).to(device)[mine] for _ in range(2))
    x = x_TD.clone().requires_grad_()
    y, _ = layer(x)
    y.backward(grad_TD)
    return [y.detach(), x.grad]


@pytest.mark.parametrize("fixed_rows", [None, T])
def test_the_layer_is_that_of_one_rank_and_the_same_in_every_run(fixed_rows: int | None) -> None:
    run_ranks(_two_ranks, fixed_rows)


def _two_ranks(rank: int, world_size: int, fixed_rows: int | None) -> None:
    transport, device = transport_here()
    mine = slice(rank * 170, T if rank else 170)
    expected = [part[mine] for part in on_tokens(make_layer(8, 2, 4).to(device), slice(0, T), device)]
    link = Link(transport, Ledger(["self" if r == rank else "node" for r in range(world_size)]), 0)
    layer = make_layer(8, 2, 4, links=(link,), rank=rank, fixed_rows=fixed_rows).to(device)
    first, second = (on_tokens(layer, mine, device) for _ in range(2))
    for found, again, whole in zip(first, second, expected, strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)  # products of other sizes


def test_a_killed_rank_is_a_fault_on_the_others() -> None:
    run_ranks(_lose_one_of_three, world_size=3, timeout_s=60, dying=frozenset({2}))


def _lose_one_of_three(rank: int, world_size: int) -> None:
    transport, device = transport_here()
    rows = [2] * world_size
    transport.begin(rows, rows, 64, device, "dispatch of layer 0").finish()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(Fault) as caught:
        transport.begin(rows, rows, 64, device, "dispatch of layer 1").finish()
    words = rf"rank {rank} of 3 in group ep: dispatch of layer 1 did not finish, rank \d (died|failed)"
    assert re.match(words, str(caught.value)), caught.value
