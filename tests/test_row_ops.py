"""Ops on rows: parts of longer rows, streaming, SwiGLU, 8 bits, weights of choices, and what the compiler sees."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_engine import ops

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 130])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_may_be_parts_of_longer_rows(dtype: torch.dtype, dim: int, streaming: bool) -> None:
    x, out = torch.randn(9, dim + 5).to(dtype), torch.zeros(6, dim + 3, dtype=dtype)
    row, weight = torch.tensor([8, 0, 3, 3, -1, 1]).int(), torch.rand(6)
    for weights in (None, weight):
        ops.gather_rows(x[:, 2 : dim + 2], row, weights, out=out[:, 1 : dim + 1], streaming=streaming)
        expected = x[row.clamp(min=0).long(), 2 : dim + 2]
        if weights is not None:
            expected = (expected.float() * weight[:, None]).to(dtype)
        kept = [0, 1, 2, 3, 5]
        assert torch.equal(out[kept, 1 : dim + 1], expected[kept])
    assert out[4].abs().sum() == 0
    assert out[:, 0].abs().sum() == out[:, dim + 1 :].abs().sum() == 0

    index, leaf = torch.tensor([[8, 2, 1], [0, -1, -1]]).int(), torch.tensor([[0, 1, 3], [2, -1, -1]]).int()
    summed = torch.zeros(2, dim + 3, dtype=dtype)
    ops.combine_rows(x[:, 2 : dim + 2], index, leaf, None, [2, 4], out=summed[:, 1 : dim + 1], streaming=streaming)
    whole = ops.combine_rows(x[:, 2 : dim + 2].contiguous(), index, leaf, None, [2, 4])
    assert torch.equal(summed[:, 1 : dim + 1], whole)
    assert summed[:, 0].abs().sum() == summed[:, dim + 1 :].abs().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 5), (1, 1), (3, 17), (40, 352)])
def test_swiglu_and_its_gradients(dtype: torch.dtype, num_rows: int, width: int) -> None:
    gate_up, grad = (torch.randn(num_rows, n).mul(3).to(dtype) for n in (2 * width, width))
    weight_N = torch.randn(num_rows)
    out = ops.swiglu(gate_up, torch.empty(num_rows, width, dtype=dtype))
    wide = gate_up.double().requires_grad_()
    weight = weight_N.double().requires_grad_()
    hidden = F.silu(wide[:, :width]) * wide[:, width:]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), hidden.detach(), **tolerance)
    (hidden * weight[:, None]).backward(grad.double())
    found = ops.SwigluGrads(torch.empty_like(gate_up), torch.empty_like(grad), torch.empty(num_rows))
    ops.swiglu_backward(grad, gate_up, weight_N, found)
    torch.testing.assert_close(found.gate_up_NF.double(), wide.grad, **tolerance)
    torch.testing.assert_close(found.hidden_NF.double(), (hidden * weight[:, None]).detach(), **tolerance)
    torch.testing.assert_close(found.weight_N.double(), weight.grad, rtol=1e-4, atol=1e-3)


def test_swiglu_of_large_and_broken_numbers() -> None:
    gate = torch.tensor([[200.0, -200.0, torch.nan, 88.0, -88.0, 0.0]])
    out = ops.swiglu(torch.cat((gate, torch.ones(1, 6)), dim=1), torch.empty(1, 6))
    assert torch.isnan(out[0, 2])
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[0, kept], F.silu(gate)[0, kept], rtol=1e-6, atol=1e-34)


@given(seed=st.integers(0, 999), bf16=st.booleans(), dim=st.sampled_from([1, 64, 128, 200, 512]))
def test_eight_bits_are_those_of_torch(seed: int, bf16: bool, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, dim, generator=generator) * 10.0 ** torch.randint(-6, 6, (5, 1), generator=generator)
    x[1, ::3] = 0
    x = x.to(torch.bfloat16 if bf16 else torch.float32)
    values, scales = torch.zeros(4, dim, dtype=torch.uint8), torch.zeros(4, -(-dim // 128))
    row = torch.tensor([1, 4, -1, 0]).int()
    ops.quantise_rows(x, row, values, scales)
    for n, source in ((0, 1), (1, 4), (3, 0)):
        for block, first in enumerate(range(0, dim, 128)):
            part = x[source, first : first + 128].float()
            scale = part.abs().max() / 448 if part.abs().max() > 0 else torch.tensor(1.0)
            assert scales[n, block] == scale
            expected = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(values[n, first : first + 128], expected.view(torch.uint8))
    assert values[2].sum() == 0
    back = ops.dequantise_rows(values, scales, x.dtype)
    expected_back = values.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, dim=1)[:, :dim]
    assert torch.equal(back, expected_back.to(x.dtype))


def test_eight_bits_of_the_smallest_numbers_are_zero_and_not_broken() -> None:
    x = torch.tensor([[1e-44, 0.0, -1e-44, 0.0]])
    values, scales = torch.empty(1, 4, dtype=torch.uint8), torch.empty(1, 1)
    ops.quantise_rows(x, torch.zeros(1, dtype=torch.int32), values, scales)
    assert (ops.dequantise_rows(values, scales, torch.float32) == 0).all()


def test_eight_bits_lose_little() -> None:
    x = torch.randn(1000, 1024)
    values, scales = torch.empty(1000, 1024, dtype=torch.uint8), torch.empty(1000, 8)
    ops.quantise_rows(x, torch.arange(1000).int(), values, scales)
    error = (ops.dequantise_rows(values, scales, torch.float32) - x).norm() / x.norm()
    assert 0.01 < error < 0.03  # 3 mantissa bits: at most 1/16 of an element


def test_weights_follow_their_choices_there_and_back() -> None:
    weights_TK = torch.rand(4, 3)
    choice_SW = torch.tensor([[2, 0], [11, -1], [5, 4], [-1, -1]]).int()
    out = torch.full((4, 5), 9.0)
    ops.choice_weights(weights_TK, choice_SW, out[:, 1:3])
    flat = weights_TK.view(-1)
    assert torch.equal(
        out[:, 1:3], torch.stack([flat[[2, 0]], flat[[11, 0]] * torch.tensor([1.0, 0]), flat[[5, 4]], torch.zeros(2)])
    )
    assert (out[:, [0, 3, 4]] == 9).all()
    grad = ops.choice_weights_backward(out[:, 1:3], choice_SW, 4, 3).view(-1)
    for choice in range(12):
        assert grad[choice] == (flat[choice] if choice in (2, 0, 11, 5, 4) else 0)


def test_every_op_is_described_to_the_compiler() -> None:
    """Schema and fake of each op, as torch checks them."""
    x, row, ids_TK = torch.randn(2, 4), torch.tensor([1, 0]).int(), torch.tensor([[0, 1], [1, 2]])
    int32 = lambda *shape: torch.empty(shape, dtype=torch.int32)  # noqa: E731
    logits, weights = torch.randn(2, 5), torch.rand(2, 2)
    calls = {
        "choose_experts": (logits, None, None, None, 0, 0, 1, 1, 1, 0, False, 1.0, ids_TK.clone(), weights.clone()),
        "choose_experts_backward": (weights, logits, ids_TK, 0, False, 1.0, logits.clone()),
        "choice_weights": (weights, torch.tensor([[0, 3]]).int(), torch.empty(1, 2)),
        "choice_weights_backward": (torch.rand(1, 2), torch.tensor([[0, 3]]).int(), weights.clone()),
        "gather_rows": (x, row, None, True, x.clone()),
        "combine_rows": (x, row[None], row[None].sort().values, None, [2], False, x[:1].clone()),
        "quantise_rows": (x, row, torch.empty(2, 4, dtype=torch.uint8), torch.empty(2, 1)),
        "dequantise_rows": (torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), x.clone()),
        "swiglu": (x, x[:, :2].clone()),
        "swiglu_backward": (x[:, :2].clone(), x, torch.rand(2), x.clone(), x[:, :2].clone(), torch.rand(2)),
        "linear_rows": (x, torch.randn(4, 3), torch.empty(2, 3)),
        "count_pairs": (ids_TK, torch.zeros(3, 3, dtype=torch.int64)),
        "plan_send": (ids_TK, int32(3).copy_(torch.arange(3)), 1, 3, 0, False, int32(1), int32(2), int32(2, 2),
                      int32(2, 2), int32(2, 1), int32(2, 1), int32(2)),
        "plan_arrival": (int32(2, 1).zero_(), int32(1).fill_(2), int32(1).zero_(), int32(3), int32(2, 1), int32(2),
                         int32(6)),
    }  # fmt: skip
    for name, arguments in calls.items():
        op = getattr(torch.ops.ep_engine, name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_ops_are_compiled_into_one_graph() -> None:
    def path(x: Tensor, logits: Tensor, table: Tensor) -> Tensor:
        ids_TK, weights_TK = ops.choose_experts(logits, ops.Selection(2))
        sent = ops.plan_send(ids_TK, table, num_ranks=2, slots_per_rank=3, own_rank=0, one_row_per_copy=False)
        rows = ops.gather_rows(x, sent.row_token_S)
        return ops.combine_rows(rows, sent.visit_row_TC, sent.visit_rank_TC, None, [2]) * weights_TK.sum()

    x, logits, table = torch.randn(20, 8), torch.randn(20, 6), torch.arange(6).int()
    compiled = torch.compile(path, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, logits, table), path(x, logits, table))
