import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from dspy_router.folded import softmax
from dspy_router.learning.calibration import calibrate
from dspy_router.learning.reliability import expected_calibration_error, recall_at_k, reliability
from dspy_router.learning.rows import Objective, TargetRows


def test_error_is_that_of_a_hand_count() -> None:
    claimed = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([1, 1, 1, 0, 1, 1])
    assert expected_calibration_error(claimed, right, bins=10) == pytest.approx((4 * 0.2 + 2 * 0.45) / 6)


def test_edges_belong_to_the_bin_below_and_zero_to_the_first() -> None:
    table = reliability(np.array([0.0, 0.5, 0.5, 1.0]), np.ones(4), bins=2)
    assert table.rows.tolist() == [3, 1]


def test_scores_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    claimed = np.append(random.random(50), [0.0, 1.0])
    right = np.append(random.random(50) < claimed[:50], [True, False])  # the last two were certain, and wrong
    found = reliability(claimed, right)
    assert found.brier_score == pytest.approx(brier_score_loss(right, claimed))
    assert found.log_loss == pytest.approx(log_loss(right, claimed))
    assert found.to_dict()["log_loss"] == found.log_loss


def test_scores_tell_from_few_rows_which_claims_are_right() -> None:
    """Where twice as sure as is right or as sure as is right is the question, and the error does worse."""
    better = {"error": 0, "log_loss": 0, "brier_score": 0}
    for seed in range(100):
        random = np.random.default_rng(seed)
        logits = 2 * random.standard_normal((50, 3))
        right = (logits + random.gumbel(size=logits.shape)).argmax(axis=1) == logits.argmax(axis=1)
        honest, sure = (reliability(softmax(scale * logits).max(axis=1), right) for scale in (1, 2))
        for name in better:
            better[name] += getattr(honest, name) < getattr(sure, name)
    assert better["log_loss"] > better["brier_score"] > better["error"] + 5


def test_an_empty_table_renders_and_has_no_error() -> None:
    table = reliability(np.array([]), np.array([]))
    assert np.isnan([table.error, table.log_loss, table.brier_score]).all()
    assert table.to_dict()["brier_score"] is None
    assert "claimed" in str(table)
    assert "<table" in table._repr_html_()


def test_bad_input_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        reliability(np.array([1.5]), np.array([1]))
    with pytest.raises(ValueError, match="nan"):
        reliability(np.array([0.5]), np.array([np.nan]))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        reliability(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        calibrate(np.zeros((3, 4)), TargetRows.from_labels(np.zeros(3, int), 5))


def test_recall_counts_the_rows_that_settle_what_is_right() -> None:
    logits = np.tile(np.arange(12.0)[::-1], (4, 1))
    known = TargetRows.from_labels(np.array([0, 2, 4, 11]), 12)
    open_ = TargetRows.of(Objective.LIKELIHOOD, np.ones((1, 12)) - np.eye(12)[:1])
    rewarded = TargetRows.of(Objective.REWARD, np.eye(12)[:1])
    rows = TargetRows.joined([known, open_, rewarded])
    found = recall_at_k(np.concatenate([logits, logits[:2]]), rows)
    assert found == {1: 0.25, 3: 0.5, 5: 0.75, 10: 0.75}
    assert recall_at_k(logits[:2], TargetRows.joined([open_, rewarded])) == {}


def test_recall_between_two_options_is_the_share_that_is_right() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert recall_at_k(logits, TargetRows.from_labels(np.array([0, 1, 1]), 2)) == {1: pytest.approx(2 / 3)}
    assert recall_at_k(logits[:1], TargetRows.from_labels(np.array([0]), 2)) == {1: 1.0}
    unsure = np.array([[0.0, 0.3], [0.0, 0.4]])
    assert recall_at_k(unsure, TargetRows.from_labels(np.array([1, 1]), 2)) == {1: 1.0}


def test_recall_breaks_ties_in_the_order_of_the_options() -> None:
    assert recall_at_k(np.zeros((2, 4)), TargetRows.from_labels(np.array([0, 2]), 4)) == {1: 0.5, 3: 1.0}
