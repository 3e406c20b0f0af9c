"""The CUDA ops against the CPU ops, and a capture of plan, gather and combine in a CUDA graph.

Under the sanitizer: ./launch/sanitize_gpu.sh
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
    same_on_both(lambda part, rows: ops.gather_rows(part[:, 1:], rows), y, row)  # rows that start anywhere
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


@pytest.mark.parametrize("rule", ["topk", "group_limited", "c2r", "c2r_grouped"])
@pytest.mark.parametrize("score", ["softmax", "softmax_of_chosen", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (256, 8), (1024, 16)])
def test_choices_are_the_same(rule: str, score: str, num_experts: int, top_k: int) -> None:
    logits_TE, grad_TK = torch.randn(500, num_experts), torch.randn(500, top_k)
    others = torch.stack([torch.randperm(num_experts - 1) for _ in range(num_experts)])
    lists_EN = (others + (others >= torch.arange(num_experts)[:, None])).int()
    how = ops.Selection(
        top_k,
        rule,  # type: ignore[arg-type]
        score=score,  # type: ignore[arg-type]
        lists_EN=lists_EN if rule.startswith("c2r") else None,
        group_of_E=(torch.randperm(num_experts) % 4).int() if rule == "c2r_grouped" else None,
        top_t=num_experts // 2 if rule.startswith("c2r") else 0,
        num_groups=4,
        max_groups=2,
    )
    there = how._replace(**{name: v.cuda() for name, v in how._asdict().items() if isinstance(v, Tensor)})
    ids_TK, weights_TK = ops.choose_experts(logits_TE, how)
    ids_there, weights_there = ops.choose_experts(logits_TE.cuda(), there)
    assert torch.equal(ids_TK, ids_there.cpu())
    torch.testing.assert_close(weights_TK, weights_there.cpu(), rtol=1e-5, atol=1e-7)  # another exp
    grad_TE = ops.choose_experts_backward(grad_TK, logits_TE, ids_TK, how)
    grad_there = ops.choose_experts_backward(grad_TK.cuda(), logits_TE.cuda(), ids_there, there)
    torch.testing.assert_close(grad_TE, grad_there.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [7, 128, 1408])
def test_swiglu_is_the_same_but_for_another_exp(dtype: torch.dtype, dim: int) -> None:
    gate_up, grad, weight_N = torch.randn(300, 2 * dim).to(dtype), torch.randn(300, dim).to(dtype), torch.randn(300)

    def backward(grad: Tensor, gate_up: Tensor, weight_N: Tensor) -> ops.SwigluGrads:
        out = ops.SwigluGrads(torch.empty_like(gate_up), torch.empty_like(grad), torch.empty_like(weight_N))
        ops.swiglu_backward(grad, gate_up, weight_N, out)
        return out

    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    here = ops.swiglu(gate_up, torch.empty_like(grad))
    there = ops.swiglu(gate_up.cuda(), torch.empty_like(grad).cuda())
    torch.testing.assert_close(here, there.cpu(), **tolerance)
    for a, b in zip(
        backward(grad, gate_up, weight_N), backward(grad.cuda(), gate_up.cuda(), weight_N.cuda()), strict=True
    ):
        torch.testing.assert_close(a, b.cpu(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [7, 128, 1000])
def test_eight_bits_are_the_same(dtype: torch.dtype, dim: int) -> None:
    x, row = torch.randn(400, dim).to(dtype), torch.randint(0, 400, (600,)).int()

    def there_and_back(x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = torch.zeros(600, dim, dtype=torch.uint8, device=x.device)
        scales = torch.zeros(600, -(-dim // ops.FP8_BLOCK), device=x.device)
        ops.quantise_rows(x, row, values, scales)
        return values, scales, ops.dequantise_rows(values, scales, dtype)

    same_on_both(there_and_back, x, row)


def test_weights_of_choices_are_the_same() -> None:
    weights_TK, choice_SW = torch.rand(100, 4), torch.randperm(400)[:300].view(100, 3).int()
    choice_SW[::7, 1:] = -1

    def there_and_back(weights_TK: Tensor, choice_SW: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros(100, 5, device=weights_TK.device)
        ops.choice_weights(weights_TK, choice_SW, out[:, 1:4])
        return out, ops.choice_weights_backward(out[:, 1:4], choice_SW, 100, 4)

    same_on_both(there_and_back, weights_TK, choice_SW)


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


def test_a_whole_layer_of_one_rank_is_captured_in_a_graph() -> None:
    """Nothing in it waits for the device."""
    layer, x_TD = make_layer(8, 2, 4).cuda(), torch.randn(256, 36).cuda()
    with torch.no_grad():
        for _ in range(3):  # makes the tables, and the products' workspaces
            expected, _ = layer(x_TD)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = layer(x_TD)
        graph.replay()
    assert torch.equal(captured, expected)
