"""The CUDA ops against the CPU ops, and a capture of plan, gather and combine in a CUDA graph.

Under the sanitizer: compute-sanitizer --tool memcheck python -m pytest -m gpu tests/test_ops_gpu.py
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ep_engine import ops
from tests.moe_cases import make_layer

pytestmark = pytest.mark.gpu


def same_on_both(op: Callable[..., object], *arguments: object) -> None:
    """Call an op with CPU arguments and with their copies on the GPU; every output must have the same bits."""
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    here, there = op(*arguments), op(*moved)
    outputs = [(here, there)] if isinstance(here, Tensor) else list(zip(here, there, strict=True))  # type: ignore[call-overload]
    for a, b in outputs:
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("num_tokens", [0, 1, 255, 256, 257, 5000])
@pytest.mark.parametrize("one_row_per_copy", [False, True])
@pytest.mark.parametrize("own_rank", [0, 3, 7])
def test_plans_are_the_same(num_tokens: int, one_row_per_copy: bool, own_rank: int) -> None:
    ids_TK = torch.rand(num_tokens, 60).topk(4).indices
    slots_E = torch.randperm(64)[:60].int()

    def send(ids: Tensor, slots: Tensor) -> ops.SendTables:
        return ops.plan_send(
            ids, slots, num_ranks=8, slots_per_rank=8, own_rank=own_rank, one_row_per_copy=one_row_per_copy
        )

    same_on_both(send, ids_TK, slots_E)
    sent = send(ids_TK, slots_E)
    rows = int(sent.rows_per_rank_P.sum())
    same_on_both(
        lambda row_slot, counts, order: ops.plan_arrival(row_slot, counts, order, num_slots=8),
        sent.row_slot_SW[:rows],
        sent.rows_per_rank_P,
        torch.randperm(8).int(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [7, 128, 4096])
def test_moves_and_sums_have_the_same_bits(dtype: torch.dtype, dim: int) -> None:
    y = torch.randn(3000, dim).to(dtype)
    row, weight = torch.randint(0, 3000, (2000,)).int(), torch.randn(2000)
    same_on_both(ops.gather_rows, y, row)
    same_on_both(ops.gather_rows, y, row, weight)
    index = torch.randperm(3000)[:2000].view(500, 4).int()
    leaf = torch.randint(0, 8, (500, 4)).sort(dim=1).values.int()
    index[::3, 2:] = leaf[::3, 2:] = -1
    for sizes in ([8], [2, 8], [1, 2, 4, 8]):
        same_on_both(ops.combine_rows, y, index, leaf, None, sizes)
        same_on_both(ops.combine_rows, y, index, leaf, torch.randn(500, 4), sizes)


def test_counts_are_the_same() -> None:
    ids_TK = torch.rand(5000, 60).topk(4).indices
    counts = torch.zeros(60, 60, dtype=torch.int64)
    counts_there = counts.cuda()
    ops.count_pairs(ids_TK, counts)
    ops.count_pairs(ids_TK.cuda(), counts_there)
    assert torch.equal(counts, counts_there.cpu())


def test_a_layer_is_that_of_the_cpu() -> None:
    layer, x_TD = make_layer(8, 2, 4), torch.randn(300, 36)
    expected, _ = layer(x_TD)
    found, _ = layer.cuda()(x_TD.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)  # cuBLAS sums in another order


def test_ops_are_captured_in_a_graph() -> None:
    """Plan, gather and combine of one rank: nothing allocates outside the graph's pool and nothing waits."""
    ids_TK, y = torch.rand(256, 8).topk(2).indices.cuda(), torch.randn(256, 64).cuda()
    slots_E = torch.arange(8).int().cuda()

    def run() -> Tensor:
        sent = ops.plan_send(ids_TK, slots_E, num_ranks=2, slots_per_rank=4, own_rank=0, one_row_per_copy=False)
        rows = ops.gather_rows(y, sent.row_token_S)
        return ops.combine_rows(rows, sent.visit_row_TC, sent.visit_rank_TC, None, [2])

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, expected)
