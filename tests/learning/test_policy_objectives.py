"""Gradients against finite differences, and estimators against the exact answer of a small problem."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspy_router.learning import policy_objectives as objectives

ROWS, OPTIONS = 6, 4


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(ROWS, OPTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Options taken, propensities, rewards and predicted rewards."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(OPTIONS, (ROWS,), generator=generator)
    propensity, reward = torch.rand(2, ROWS, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    return chosen, propensity, reward, torch.rand(ROWS, OPTIONS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: objectives.expected_reward(logits, drawn()[3]),
        lambda logits: objectives.inverse_propensity(logits, *drawn()[:3]),
        lambda logits: objectives.self_normalized(logits, *drawn()[:3]),
        lambda logits: objectives.doubly_robust(logits, *drawn()),
        lambda logits: objectives.score_function(logits, drawn()[0], drawn()[2]),
        objectives.entropy,
        lambda logits: objectives.divergence_from(logits, drawn()[3]),
    ],
    ids=["expected", "ips", "snips", "doubly robust", "score function", "entropy", "divergence"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    assert loss(logits).shape == (ROWS,)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.fixture
def every_draw(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One input, each option taken once: logits, options, propensities, rewards, and the exact gradient."""
    repeated = logits[:1].expand(OPTIONS, OPTIONS).clone().requires_grad_()
    chosen = torch.arange(OPTIONS)
    propensity = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    reward = torch.tensor([0.0, 1.0, 0.3, -2.0], dtype=torch.float64)
    policy = torch.softmax(logits[0], dim=0)
    return repeated, chosen, propensity, reward, policy * ((policy * reward).sum() - reward)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """The gradient in the one input's logits, which all rows repeat."""
    return torch.autograd.grad(loss, logits)[0].sum(dim=0)


def test_the_expected_reward_has_the_closed_form_gradient(every_draw: tuple[Tensor, ...]) -> None:
    logits, _, _, reward, exact = every_draw
    loss = objectives.expected_reward(logits[:1], reward[None]).sum()
    torch.testing.assert_close(gradient(loss, logits), exact)


def test_inverse_propensity_is_unbiased(every_draw: tuple[Tensor, ...]) -> None:
    logits, chosen, propensity, reward, exact = every_draw
    loss = (propensity * objectives.inverse_propensity(logits, chosen, propensity, reward)).sum()
    torch.testing.assert_close(gradient(loss, logits), exact)


@pytest.mark.parametrize("predicted", [0.0, 5.0])
def test_doubly_robust_is_unbiased_whatever_the_reward_model(every_draw: tuple[Tensor, ...], predicted: float) -> None:
    logits, chosen, propensity, reward, exact = every_draw
    model = torch.linspace(0, predicted, OPTIONS, dtype=torch.float64).expand(OPTIONS, OPTIONS)
    loss = (propensity * objectives.doubly_robust(logits, chosen, propensity, reward, model)).sum()
    torch.testing.assert_close(gradient(loss, logits), exact)


def test_doubly_robust_survives_wrong_propensities_with_a_right_reward_model(every_draw: tuple[Tensor, ...]) -> None:
    logits, chosen, propensity, reward, exact = every_draw
    model = reward.expand(OPTIONS, OPTIONS)
    loss = (propensity * objectives.doubly_robust(logits, chosen, propensity**2, reward, model)).sum()
    torch.testing.assert_close(gradient(loss, logits), exact)


def test_the_score_function_is_unbiased_under_any_baseline(every_draw: tuple[Tensor, ...]) -> None:
    logits, chosen, _, reward, exact = every_draw
    policy = torch.softmax(logits[0], dim=0).detach()
    for baseline in (0.0, 0.7):
        loss = (policy * objectives.score_function(logits, chosen, reward - baseline)).sum()
        torch.testing.assert_close(gradient(loss, logits), exact)


def test_self_normalized_ignores_a_constant_added_to_all_rewards(logits: Tensor) -> None:
    chosen, propensity, reward, _ = drawn()
    logits.requires_grad_()
    plain, shifted = (
        torch.autograd.grad(objectives.self_normalized(logits, chosen, propensity, reward + c).mean(), logits)[0]
        for c in (0.0, 10.0)
    )
    torch.testing.assert_close(plain, shifted)


def test_a_run_is_held_against_the_other_runs_of_its_example() -> None:
    reward, example = torch.tensor([1.0, 0.0, 0.5, 4.0]), torch.tensor([2, 2, 2, 0])
    found = objectives.leave_one_out_advantage(reward, example)
    torch.testing.assert_close(found, torch.tensor([0.75, -0.75, 0.0, 3.5]))
    assert objectives.leave_one_out_advantage(torch.tensor([3.0]), torch.tensor([0])).tolist() == [3.0]


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_propensity_is_named(propensity: float) -> None:
    with pytest.raises(ValueError, match=rf"Row 1 has propensity {propensity}"):
        objectives.importance_weights(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.5, propensity]))
