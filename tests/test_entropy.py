"""The loss against torch's cross entropy, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from ep_engine.entropy import entropy_sum


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_torch(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    logits = (4 * torch.randn(2, rows, 50)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (2, rows))
    expected = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(expected / 7, logits)
    found = entropy_sum(logits * 1, targets)  # the product is used up
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found / 7, logits)[0], grad)


def test_the_gradient_lies_where_the_logits_were() -> None:
    logits = torch.randn(1, 600, 50, requires_grad=True)
    used_up = logits * 1
    loss = entropy_sum(used_up, torch.zeros(1, 600, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, used_up)
    assert grad.data_ptr() == used_up.data_ptr()


@pytest.mark.parametrize("rows", [0, 700])
def test_masked_targets_have_neither_loss_nor_gradient(rows: int) -> None:
    torch.manual_seed(rows)
    logits = torch.randn(2, rows, 50, requires_grad=True)
    targets = torch.randint(0, 50, (2, rows)).masked_fill(torch.rand(2, rows) < 0.5, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    (grad,) = torch.autograd.grad(expected, logits)
    found = entropy_sum(logits * 1, targets, masked=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], grad)


@pytest.mark.parametrize("rows", [0, 1, 512, 700])
def test_losses_of_tokens_are_those_of_torch_and_the_sum_keeps_its_bits(rows: int) -> None:
    torch.manual_seed(rows)
    logits = torch.randn(2, rows, 50)
    targets = torch.randint(0, 50, (2, rows)).masked_fill(torch.rand(2, rows) < 0.5, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    of_tokens = torch.empty(2, rows)
    found = entropy_sum(logits * 1, targets, masked=True, of_tokens_BS=of_tokens)
    torch.testing.assert_close(of_tokens.flatten(), expected)
    assert found == entropy_sum(logits * 1, targets, masked=True)
