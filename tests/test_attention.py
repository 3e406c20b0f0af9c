"""Attention over rows that hold several documents: each as if it stood alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ep_engine.attention import attend, keep_apart
from ep_engine.data.batches import Batches
from ep_engine.data.tokens import TokenFile, write_token_file
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig

LENGTHS = [[3, 1, 8, 4], [16], [5, 11]]
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden_size=16, gate="linear"),
)  # fmt: skip


def numbers(lengths: list[list[int]]) -> Tensor:
    """(B, S) document numbers; rows begin with the number that the row before ended with."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def parts(rows: Tensor, lengths: list[list[int]]) -> list[Tensor]:
    """Every document of (B, S, ...) alone, (1, length, ...)."""
    return [part for row, sizes in zip(rows, lengths, strict=True) for part in row.unsqueeze(0).split(sizes, dim=1)]


@pytest.mark.parametrize("heads", [4, 2])
def test_a_document_in_a_row_is_that_document_alone(heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 16, n, 8, requires_grad=True) for n in (4, heads, heads))
    y = attend(*(x.transpose(1, 2) for x in (q, k, v)), keep_apart(numbers(LENGTHS))).transpose(1, 2)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (q, k, v), grad)
    each = zip(*(parts(x, LENGTHS) for x in (q, k, v)), strict=True)
    alone = torch.cat([attend(*(x.transpose(1, 2) for x in qkv), None).transpose(1, 2)[0] for qkv in each])
    torch.testing.assert_close(y.flatten(0, 1), alone)
    grads_alone = torch.autograd.grad(alone, (q, k, v), grad.flatten(0, 1))
    for found, expected in zip(grads, grads_alone, strict=True):
        torch.testing.assert_close(found, expected)


def test_logits_of_a_packed_row_are_those_of_its_documents() -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens = torch.randint(0, 64, (3, 16))
    packed = model(tokens, numbers(LENGTHS))
    for found, ids in zip(parts(packed, LENGTHS), parts(tokens, LENGTHS), strict=True):
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-5)  # other positions round otherwise
    assert not torch.allclose(packed, model(tokens))


@pytest.mark.parametrize("window", [1, 3, 16, 40])
def test_a_window_hides_what_is_behind_it(window: int) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG.model_copy(update={"sliding_window": window, "num_layers": 1}))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    tokens = torch.randint(0, 64, (3, 16))
    whole, packed = model(tokens), model(tokens, numbers(LENGTHS))
    for position in (0, 5, 15):
        first = max(position - window + 1, 0)
        rows = tokens.clone()
        rows[:, :first] = 7
        torch.testing.assert_close(model(rows)[:, position], whole[:, position])
        rows[:, first] = (rows[:, first] + 1) % 64
        assert not torch.allclose(model(rows)[:, position], whole[:, position])
    for found, ids in zip(parts(packed, LENGTHS), parts(tokens, LENGTHS), strict=True):
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-5)


def test_a_batch_knows_the_document_of_every_token(tmp_path: Path) -> None:
    lengths = [5, 1, 9, 3, 6]
    write_token_file(tmp_path / "text", [torch.full((n,), i).numpy() for i, n in enumerate(lengths)], 64)
    file = TokenFile(tmp_path / "text", vocab_size=64)
    assert file.documents(0, 24).tolist() == file.read(0, 24).tolist()
    assert file.documents(4, 3).tolist() == [0, 1, 2]
    batch = Batches(file, sequence_length=7, batch_size=3, seed=0).batch(0)
    assert batch.documents_BS.equal(batch.inputs_BS)
    assert batch.documents_BS.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 2])
def test_the_gpu_gives_what_the_cpu_gives(heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 16, 64) for n in (4, heads, heads))
    expected = attend(q, k, v, keep_apart(numbers(LENGTHS)))
    on_gpu = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
    found = attend(*on_gpu, keep_apart(numbers(LENGTHS).cuda()))
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.02)  # bfloat16 keeps 8 bits
