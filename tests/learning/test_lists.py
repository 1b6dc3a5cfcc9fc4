"""Rows, loss and calibration of lists, with tensors alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from dspy_router.learning.fit import fit_head
from dspy_router.learning.list_calibration import calibrate_list, description_transfer, held_out_logits, known_members
from dspy_router.learning.list_rows import ListRows
from dspy_router.learning.rows import Objective
from dspy_router.learning.rows_loss import RowsLoss
from dspy_router.list_heads import ListHead

OPTIONS, DIMENSION = 4, 12


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def problem(count: int, seed: int = 0) -> tuple[ListHead, np.ndarray, np.ndarray]:
    """A head, inputs, and members drawn for each option on its own: the last is in hardly any."""
    random = np.random.default_rng(seed)
    described = unit(np.random.default_rng(99).standard_normal((OPTIONS, DIMENSION)))
    vectors = unit(random.standard_normal((count, DIMENSION)))
    members = random.random((count, OPTIONS)) < expit(12 * vectors @ described.T - [1, 1, 1, 4])
    return ListHead(torch.from_numpy(described)), vectors, members


def mixed_rows(count: int = 30) -> ListRows:
    random = np.random.default_rng(1)
    rows = ListRows.from_sets(random.random((count, OPTIONS)) < 0.5)
    rows.objective[::3] = Objective.DISTRIBUTION
    rows.target[::3] = [0.7, 0.3]
    rows.objective[1::3, 0] = Objective.REWARD
    rows.target[1::3, 0] = [0.2, 0.9]
    rows.target[2::3, 1] = [1.0, 0.4]
    rows.weight[4:9, 2] = 0.0
    return rows


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_the_loss_is_that_of_two_options_a_pair(margin: float) -> None:
    rows = mixed_rows()
    logits = torch.randn(len(rows), OPTIONS, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([logits, torch.zeros_like(logits)], dim=-1).reshape(-1, 2)
    expected = RowsLoss(rows.each(), margin)(pairs)
    loss = rows.loss(margin)
    assert loss(logits).item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [slice(0, 7), slice(7, len(rows) + 5)]
    assert sum(loss.share(logits[part], part).item() for part in parts) == pytest.approx(expected.item(), rel=1e-5)
    index = torch.tensor([3, 11, 2])
    assert loss(logits[index], index).item() == pytest.approx(
        rows.part(index.numpy()).loss(margin)(logits[index]).item()
    )


def test_nothing_known_costs_nothing() -> None:
    rows = ListRows.joined([ListRows.unknown(3, OPTIONS), ListRows.from_sets(np.eye(OPTIONS, dtype=bool))])
    loss = rows.loss()
    assert loss.share(torch.full((3, OPTIONS), 9.0), slice(0, 3)).item() == 0.0
    assert loss(torch.full((2, OPTIONS), 9.0), torch.tensor([0, 1])).item() == 0.0


def test_worth_is_told_option_by_option() -> None:
    rows = ListRows.from_sets(np.array([[True, False]]))
    assert rows.worth(np.array([[True, True]])).tolist() == [[1.0, 0.0]]
    assert rows.with_labels(np.array([1]), 0.5).weight.tolist() == [[1.0, 1.0], [0.5, 0.5]]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight \(2, 3\)"):
        ListRows(np.zeros((2, 4, 2)), np.zeros((2, 3)), np.zeros((2, 3)))


def test_fitting_finds_each_options_own_threshold() -> None:
    head, vectors, members = problem(600)
    fit_head(head, vectors, ListRows.from_sets(members))
    _, unseen, truth = problem(600, seed=1)
    # Drawn at random, so that even the true probabilities are right in no more than this.
    best = np.mean((expit(12 * unseen @ head.option_vectors.numpy().T - [1, 1, 1, 4]) >= 0.5) == truth)
    assert np.mean(head.chosen(unseen) == truth) > best - 0.02


def test_calibrated_probabilities_are_as_often_right_as_they_say() -> None:
    head, vectors, members = problem(800)
    rows = ListRows.from_sets(members)
    fit_head(head, vectors, rows)
    with torch.no_grad():
        head.temperature.fill_(0.2)  # far too sure
        head.bias.add_(1.0)
    seen = held_out_logits(head, vectors, rows)
    assert seen is not None
    assert sorted(seen.rows.tolist()) == list(range(800))
    _, unseen, truth = problem(2000, seed=2)
    calibration = calibrate_list(head.logits(unseen[:1000]), ListRows.from_sets(truth[:1000]))
    assert calibration is not None
    calibration.apply(head)
    policy = head.policy(unseen[1000:])
    assert np.allclose(policy.mean(axis=0), truth[1000:].mean(axis=0), atol=0.03)
    likely = policy > 0.8
    assert abs(policy[likely].mean() - truth[1000:][likely].mean()) < 0.05
    assert np.allclose(head.logits(unseen[:5]), calibration(_before(head, calibration, unseen[:5])), atol=1e-3)


def _before(head: ListHead, calibration: object, vectors: np.ndarray) -> np.ndarray:
    return (head.logits(vectors) - calibration.bias) * calibration.temperature  # type: ignore[attr-defined]


def test_too_few_rows_and_rewards_leave_a_head_as_it_is() -> None:
    head, vectors, members = problem(49)
    rows = ListRows.from_sets(members)
    assert held_out_logits(head, vectors, rows) is None
    assert calibrate_list(head.logits(vectors), rows) is None
    many = ListRows.from_sets(problem(200)[2])
    rewards = replace(many, objective=np.full_like(many.objective, Objective.REWARD))
    assert calibrate_list(np.zeros((200, OPTIONS), np.float32), rewards) is None


def test_what_is_known_of_members() -> None:
    truth, weight = known_members(mixed_rows())
    assert truth[0].tolist() == pytest.approx([0.7] * OPTIONS)  # a teacher's
    assert weight[1, 0] == 0  # a reward
    assert weight[2, 1] == 0  # open
    assert weight[2, 0] == 1


def test_a_description_transfer_finds_what_cosines_say() -> None:
    head, vectors, members = problem(4000)
    members[:, 3] = False  # an option that is in no list tells nothing
    found = description_transfer(head, vectors, ListRows.from_sets(members))
    assert found is not None
    assert found.scale == pytest.approx(12, abs=1)
    assert found.offset == pytest.approx(-1, abs=0.2)
    assert description_transfer(head, vectors, ListRows.from_sets(np.zeros_like(members))) is None
