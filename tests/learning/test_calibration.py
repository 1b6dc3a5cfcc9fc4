import numpy as np
import pytest
import torch

from dspy_router.folded import softmax
from dspy_router.heads import OptionHead
from dspy_router.learning.calibration import FEWEST_ROWS, calibrate, held_out
from dspy_router.learning.reliability import expected_calibration_error
from dspy_router.learning.rows import Objective, TargetRows


def drawn(rows: int, options: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn with exactly their softmax."""
    random = np.random.default_rng(seed)
    logits = 2 * random.standard_normal((rows, options)).astype(np.float32)
    return logits, (logits + random.gumbel(size=logits.shape)).argmax(axis=1)


def error(logits: np.ndarray, labels: np.ndarray) -> float:
    probabilities = softmax(logits)
    return expected_calibration_error(probabilities.max(1), probabilities.argmax(1) == labels)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_found_and_calibrates_rows_not_fitted_to(factor: float) -> None:
    logits, labels = drawn(3000)
    calibration = calibrate(factor * logits, TargetRows.from_labels(labels, 4))
    assert calibration is not None
    assert calibration.temperature == pytest.approx(factor, rel=0.1)
    assert calibration.loss <= calibration.loss_before
    new_logits, new_labels = drawn(20000, seed=1)
    assert error(calibration(factor * new_logits), new_labels) < 0.02
    if factor != 1.0:
        assert error(factor * new_logits, new_labels) > 0.05


@pytest.mark.parametrize("rows", [60, 300])
def test_rows_that_are_all_right_are_no_proof_of_certainty(rows: int) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    logits = (4 * np.eye(3)[labels] + random.standard_normal((rows, 3))).astype(np.float32)
    logits = logits[logits.argmax(axis=1) == labels]
    labels = logits.argmax(axis=1)
    calibration = calibrate(logits, TargetRows.from_labels(labels, 3))
    assert calibration is not None
    assert not calibration.at_bound
    claimed = softmax(calibration(logits)).max(axis=1).mean()
    assert 1 / (2 * rows) < 1 - claimed < 4 / rows


def test_logits_that_say_nothing_take_the_temperature_to_its_bound() -> None:
    logits = 50 * np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    calibration = calibrate(logits, TargetRows.from_labels(np.random.default_rng(1).integers(4, size=500), 4))
    assert calibration is not None
    assert calibration.at_bound


def test_cross_fitted_logits_are_calibrated_by_other_rows() -> None:
    logits, labels = drawn(400)
    calibration = calibrate(3 * logits, TargetRows.from_labels(labels, 4))
    assert calibration is not None
    assert calibration.cross_fitted is not None
    np.testing.assert_allclose(calibration.cross_fitted, calibration(3 * logits), rtol=0.2)
    assert (calibration.cross_fitted != calibration(3 * logits)).all()
    alone = calibrate(3 * logits, TargetRows.from_labels(labels, 4), groups=[0] * 400)
    assert alone is not None
    assert alone.cross_fitted is None


def test_biases_are_fitted_where_an_option_is_claimed_too_often() -> None:
    logits, labels = drawn(3000)
    shift = np.array([2.0, 0, 0, 0], np.float32)
    calibration = calibrate(logits + shift, TargetRows.from_labels(labels, 4))
    assert calibration is not None
    bias = calibration.bias - calibration.bias.mean()
    np.testing.assert_allclose(bias, -(shift - shift.mean()), atol=0.25)
    new_logits, new_labels = drawn(20000, seed=1)
    assert error(calibration(new_logits + shift), new_labels) < 0.02


def test_no_biases_where_none_are_needed() -> None:
    logits, labels = drawn(400)
    calibration = calibrate(logits, TargetRows.from_labels(labels, 4))
    assert calibration is not None
    assert not calibration.bias.any()


def test_an_option_with_few_rows_gets_no_bias() -> None:
    logits, labels = drawn(3000)
    keep = np.concatenate([np.flatnonzero(labels != 3), np.flatnonzero(labels == 3)[:10]])
    shift = np.array([2.0, 0, 0, 0], np.float32)
    calibration = calibrate(logits[keep] + shift, TargetRows.from_labels(labels[keep], 4))
    assert calibration is not None
    assert calibration.bias[0] < calibration.bias[1] - 1.5
    assert calibration.bias[3] == 0


def test_many_rows_of_few_groups_give_no_bias() -> None:
    logits, labels = drawn(3000)
    rows = TargetRows.from_labels(labels, 4)
    shifted = logits + np.array([2.0, 0, 0, 0], np.float32)
    for groups, expected in ((range(3000), True), (np.arange(3000) // 10, True), (np.arange(3000) // 300, False)):
        calibration = calibrate(shifted, rows, groups=list(groups))
        assert calibration is not None
        assert calibration.bias.any() == expected


def test_a_calibrated_head_has_the_calibrated_logits() -> None:
    random = np.random.default_rng(0)
    head = OptionHead(torch.eye(4, 8))
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    vectors = random.standard_normal((2000, 8)).astype(np.float32)
    before = head(torch.from_numpy(vectors)).detach().numpy()
    labels = (0.5 * before + [1.5, 0, 0, 0] + random.gumbel(size=before.shape)).argmax(axis=1)
    calibration = calibrate(before, TargetRows.from_labels(labels, 4))
    assert calibration is not None
    assert calibration.bias.any()
    calibration.apply(head)
    np.testing.assert_allclose(head(torch.from_numpy(vectors)).detach().numpy(), calibration(before), atol=1e-4)


def test_partial_knowledge_and_teachers_calibrate_too() -> None:
    logits, labels = drawn(4000)
    possible = np.ones((4000, 4), bool)
    tried = np.random.default_rng(2).integers(4, size=4000)  # one option tried: right, or ruled out
    possible[np.arange(4000), tried] = False
    possible[tried == labels] = np.eye(4, dtype=bool)[labels[tried == labels]]
    for rows in (
        TargetRows.of(Objective.LIKELIHOOD, possible),
        TargetRows.of(Objective.DISTRIBUTION, softmax(logits)),
    ):
        calibration = calibrate(3 * logits, rows)
        assert calibration is not None
        assert calibration.temperature == pytest.approx(3, rel=0.15)


def test_rewards_take_no_part() -> None:
    logits, labels = drawn(1000)
    rewards = np.random.default_rng(1).random((1000, 4))
    mixed = TargetRows.joined([TargetRows.from_labels(labels, 4), TargetRows.of(Objective.REWARD, rewards)])
    alone = calibrate(logits, TargetRows.from_labels(labels, 4))
    both = calibrate(np.concatenate([logits, logits]), mixed)
    assert alone is not None
    assert both is not None
    assert both.temperature == alone.temperature
    assert calibrate(logits, TargetRows.of(Objective.REWARD, rewards)) is None


def test_too_few_rows_are_left_alone() -> None:
    logits, labels = drawn(FEWEST_ROWS)
    assert calibrate(logits, TargetRows.from_labels(labels, 4)) is not None
    assert calibrate(logits[1:], TargetRows.from_labels(labels[1:], 4)) is None
    assert held_out(range(5 * FEWEST_ROWS - 1)) is None
    assert held_out(["one task"] * 1000) is None


def test_a_fifth_is_held_out_by_seed() -> None:
    first, again, other = held_out(range(1000)), held_out(range(1000)), held_out(range(1000), seed=1)
    assert first is not None
    assert other is not None
    assert first.sum() == other.sum() == 200
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("sizes", [[10] * 100, [1] * 400 + [7] * 50, [300, 500]])
def test_a_group_is_held_out_whole(sizes: list[int]) -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    mask = held_out(groups.tolist())
    assert mask is not None
    assert not set(groups[mask]) & set(groups[~mask])
    assert 0.2 * len(groups) <= mask.sum() < len(groups)
