import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_router.learning.objectives import partial_likelihood, soft_cross_entropy
from dspy_router.learning.policy_objectives import expected_reward
from dspy_router.learning.rows import REWARD_SCALE, Objective, TargetRows

OPTIONS = 4


def mixed(seed: int, rows: int = 12) -> TargetRows:
    """Labels, ruled-out options, teachers' words and rewards in a random order, with weights of their own."""
    random = np.random.default_rng(seed)
    target, objective = np.zeros((rows, OPTIONS), np.float32), np.zeros(rows, np.int8)
    for row, kind in enumerate(random.permutation(np.arange(rows) % 4)):
        if kind == 0:
            target[row, random.integers(OPTIONS)] = 1.0
        elif kind == 1:
            target[row] = 1.0
            target[row, random.integers(OPTIONS)] = random.choice([0.0, 0.2])
        elif kind == 2:
            objective[row], target[row] = Objective.DISTRIBUTION, random.dirichlet(np.ones(OPTIONS))
        else:
            objective[row], target[row] = Objective.REWARD, random.normal(size=OPTIONS)
    return TargetRows(target, objective, random.uniform(0.1, 3.0, rows).astype(np.float32))


def logits_for(rows: int) -> torch.Tensor:
    return torch.randn(rows, OPTIONS, generator=torch.Generator().manual_seed(rows)).requires_grad_()


def part(rows: TargetRows, index: np.ndarray) -> TargetRows:
    return TargetRows(rows.target[index], rows.objective[index], rows.weight[index])


def with_gradient(rows: TargetRows, logits: torch.Tensor, margin: float, index: torch.Tensor | None = None):
    loss = rows.loss(margin)(logits, index)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), margin=st.sampled_from([0.0, 2.0]))
def test_a_mixture_is_the_weighted_sum_of_its_objectives_alone(seed: int, margin: float) -> None:
    rows = mixed(seed)
    logits = logits_for(len(rows))
    loss, gradient = with_gradient(rows, logits, margin)
    expected, expected_gradient = torch.zeros(()), torch.zeros_like(logits)
    for number in range(len(rows)):
        own = part(rows, np.array([number]))
        single = logits[number : number + 1].detach().requires_grad_()
        own_loss, own_gradient = with_gradient(own, single, margin)
        share = float(rows.weight[number] / rows.weight.sum())
        expected = expected + share * own_loss
        expected_gradient[number] = share * own_gradient[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12))
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(seed: int, size: int) -> None:
    rows = mixed(seed)
    index = np.random.default_rng(seed).permutation(len(rows))[:size]
    logits = logits_for(size)
    batch = with_gradient(rows, logits, 2.0, torch.from_numpy(index))
    alone = with_gradient(part(rows, index), logits, 2.0)
    torch.testing.assert_close(batch, alone)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12))
def test_the_shares_of_all_parts_add_up_to_the_loss(seed: int, size: int) -> None:
    rows = mixed(seed)
    logits, loss = logits_for(len(rows)), rows.loss(2.0)
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    torch.testing.assert_close(torch.stack([loss.share(logits[part], part) for part in parts]).sum(), loss(logits))


@pytest.mark.parametrize("objective", list(Objective))
def test_all_rows_as_a_batch_are_all_rows(objective: Objective) -> None:
    random = np.random.default_rng(0)
    rows = TargetRows.of(objective, random.dirichlet(np.ones(OPTIONS), 9), random.uniform(0.1, 2, 9))
    logits = logits_for(9)
    torch.testing.assert_close(with_gradient(rows, logits, 0.0, torch.arange(9)), with_gradient(rows, logits, 0.0))


def test_each_objective_has_its_loss() -> None:
    logits, target = logits_for(3), torch.tensor([[1.0, 1.0, 0.0, 0.3], [0.1, 0.2, 0.3, 0.4], [1.0, -1.0, 0.0, 2.0]])
    losses = (partial_likelihood, soft_cross_entropy, lambda *given: REWARD_SCALE * expected_reward(*given))
    for objective, loss in zip(Objective, losses, strict=True):
        own = slice(int(objective), int(objective) + 1)
        found = TargetRows.of(objective, target[own].numpy()).loss()(logits[own])
        torch.testing.assert_close(found, loss(logits[own], target[own])[0])


def test_the_margin_is_taken_off_the_right_option_of_settled_rows_alone() -> None:
    settled = TargetRows.of(Objective.LIKELIHOOD, np.array([[0, 0, 1, 0]]))
    shifted = torch.tensor([[0.5, -1.0, 2.0 - 3.0, 0.0]])
    expected = torch.nn.functional.cross_entropy(shifted, torch.tensor([2]))
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    torch.testing.assert_close(settled.loss(margin=3.0)(logits), expected)
    for rows in (
        TargetRows.of(Objective.LIKELIHOOD, np.array([[1, 1, 1, 0]])),
        TargetRows.of(Objective.DISTRIBUTION, np.array([[0, 0, 1, 0]])),
        TargetRows.of(Objective.REWARD, np.array([[0, 0, 1, 0]])),
    ):
        torch.testing.assert_close(rows.loss(margin=3.0)(logits), rows.loss()(logits))


def test_worth_is_whether_an_option_is_likely_or_the_reward_itself() -> None:
    rows = TargetRows.joined([
        TargetRows.from_labels(np.array([1, 1]), 3),
        TargetRows.of(Objective.LIKELIHOOD, np.array([[0, 1, 1]])),
        TargetRows.of(Objective.DISTRIBUTION, np.array([[0.7, 0.1, 0.2], [0.5, 0.1, 0.4]])),
        TargetRows.of(Objective.REWARD, np.array([[0.25, -3.0, 1.5], [0.25, -3.0, 1.5]])),
    ])  # fmt: skip
    assert rows.worth(np.array([1, 0, 2, 1, 2, 1, 0])).tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, -3.0, 0.25]


def test_joined_rows_keep_their_order_and_weights() -> None:
    first = TargetRows.from_labels(np.array([0]), 2)
    second = TargetRows.of(Objective.REWARD, np.array([[1.0, 2.0]]), np.array([5.0]))
    joined = TargetRows.joined([first, second])
    assert joined.objective.tolist() == [Objective.LIKELIHOOD, Objective.REWARD]
    assert joined.weight.tolist() == [1.0, 5.0]
    assert joined.target.tolist() == [[1.0, 0.0], [1.0, 2.0]]
