import pytest
import torch

from dspy_router.learning.objectives import partial_likelihood, soft_cross_entropy


def logits_64(rows: int = 4, options: int = 5) -> torch.Tensor:
    return torch.randn(rows, options, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_gradients_match_finite_differences() -> None:
    possible = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 0.1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), dim=1)
    assert torch.autograd.gradcheck(lambda logits: partial_likelihood(logits, possible), logits_64())
    assert torch.autograd.gradcheck(lambda logits: soft_cross_entropy(logits, target), logits_64())


def test_one_possible_option_is_cross_entropy() -> None:
    logits, labels = logits_64(), torch.tensor([0, 2, 4, 1])
    possible = torch.nn.functional.one_hot(labels, 5).double()
    torch.testing.assert_close(
        partial_likelihood(logits, possible), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    )


def test_one_option_ruled_out_is_the_negative_likelihood() -> None:
    logits = logits_64(1)
    possible = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(partial_likelihood(logits, possible), -torch.log(1 - torch.softmax(logits, 1)[:, 0]))


def test_everything_possible_says_nothing() -> None:
    torch.testing.assert_close(
        partial_likelihood(logits_64(2), torch.ones(2, 5, dtype=torch.float64)), torch.zeros(2).double()
    )


def test_a_row_with_nothing_possible_is_refused() -> None:
    with pytest.raises(ValueError, match="rules out every option"):
        partial_likelihood(logits_64(1), torch.zeros(1, 5, dtype=torch.float64))
