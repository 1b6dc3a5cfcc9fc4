import io

import numpy as np
import pytest

from dspy_router.evaluation.reliability import (
    reliability_figure,
    risk_coverage,
    risk_coverage_figure,
    roc_figure,
)
from dspy_router.learning.reliability import reliability


def drawn(figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def test_risk_is_the_mean_loss_of_what_is_kept_and_coverage_counts_rows_in_scope() -> None:
    curve = risk_coverage(
        np.array([4.0, 3.0, 2.0, 1.0]), np.array([0, 1, 0, 1]), in_scope=np.array([True, False, True, True])
    )
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_allclose(curve.coverage, [1 / 3, 1 / 3, 2 / 3, 1])
    assert curve.coverage_at(0.0) == pytest.approx(1 / 3)
    assert curve.coverage_at(0.4) == pytest.approx(2 / 3)


def test_rows_of_equal_score_are_kept_together() -> None:
    curve = risk_coverage(np.array([1.0, 1.0, 0.0]), np.array([0, 1, 0]))
    assert curve.thresholds.tolist() == [1.0, 0.0]
    assert curve.risk[0] == 0.5


def test_no_threshold_is_good_enough() -> None:
    assert risk_coverage(np.array([1.0, 0.0]), np.array([1, 1])).coverage_at(0.5) == 0.0


def test_bad_shapes_and_no_rows_in_scope_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        risk_coverage(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="in scope"):
        risk_coverage(np.zeros(2), np.zeros(2), in_scope=np.zeros(2, bool))


def test_pictures_show_every_curve_with_its_figure() -> None:
    random = np.random.default_rng(0)
    claimed = random.random(500)
    right = random.random(500) < claimed
    diagram = reliability_figure({"calibrated": reliability(claimed, right), "always": reliability(claimed, right | 1)})
    curves = risk_coverage_figure({"probability": risk_coverage(claimed, ~right)})
    roc = roc_figure({"probability": claimed, "noise": random.random(500)}, right)
    legends = [
        [text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in (diagram, curves, roc)
    ]
    assert [len(legend) for legend in legends] == [2, 1, 2]
    assert legends[0][0].startswith("calibrated: expected calibration error 0.0")
    assert legends[2][0].startswith("probability: area 0.8")
    for figure in (diagram, curves, roc):
        assert drawn(figure).startswith(b"\x89PNG")


def test_a_roc_curve_needs_both_kinds_of_rows() -> None:
    with pytest.raises(ValueError, match="out of scope"):
        roc_figure({"score": np.zeros(3)}, np.ones(3, bool))
