"""How far probabilities can be believed, and how high the right option ranks: measures of held-out rows."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspy_router.learning.calibration import settled_rows
from dspy_router.learning.rows import Objective, TargetRows
from dspy_router.tables import table

RECALL_AT = (1, 3, 5, 10)


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often decisions were right, by the probability they claimed; renders as a table.

    Of probabilities that are right, 50 rows have an expected calibration error of some 0.13 by chance, 200 rows 0.07.
    The two scores are lowest, on average, for what is right (Gneiting and Raftery 2007, "Strictly Proper Scoring Rules,
    Prediction, and Estimation"): with few rows they tell which of two sets of claims about the same decisions is better
    where the error does not. What size they have depends on how hard the decisions are.

    Attributes:
        edges: Float64 [bins + 1], equally wide from 0 to 1. A bin holds its upper edge; the first, both.
        rows: Int [bins].
        confidence: Float64 [bins], mean probability claimed; nan where a bin is empty.
        accuracy: Float64 [bins], share that was right; nan where a bin is empty.
        log_loss: Mean of -log of the probability claimed for what came, right or not; nan without rows.
        brier_score: Mean of (claimed - right)², from 0 to 1; nan without rows.
    """

    edges: np.ndarray
    rows: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    log_loss: float
    brier_score: float

    @property
    def error(self) -> float:
        """Expected calibration error: Σ_bins share of rows · |accuracy - confidence|, from 0 to 1; nan without rows."""
        filled = self.rows > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float(np.average(gaps, weights=self.rows[filled])) if filled.any() else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible; empty bins are left out."""
        filled = self.rows > 0
        columns = {"low": self.edges[:-1], "high": self.edges[1:], "rows": self.rows}
        columns |= {"confidence": self.confidence, "accuracy": self.accuracy}
        figures = {"error": self.error, "log_loss": self.log_loss, "brier_score": self.brier_score}
        return {
            **{name: figure if filled.any() else None for name, figure in figures.items()},
            **{name: column[filled].tolist() for name, column in columns.items()},
        }

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, form: str) -> str:
        lines = [
            (f"{low:.2f} to {high:.2f}", rows, confidence, accuracy)
            for low, high, rows, confidence, accuracy in zip(
                self.edges[:-1], self.edges[1:], self.rows, self.confidence, self.accuracy, strict=True
            )
            if rows
        ]
        return table(
            lines,
            headers=("claimed", "rows", "mean claimed", "right"),
            floatfmt=".3f",
            form=form,
            disable_numparse=False,
        )


def reliability(probabilities: np.ndarray, right: np.ndarray, bins: int = 15) -> Reliability:
    """Compare what decisions claimed with what came of them.

    Args:
        probabilities: Float [n], of the option chosen, from 0 to 1.
        right: Bool or float [n], whether it was right, or how good it was, from 0 to 1.
        bins: So many, equally wide.

    Raises:
        ValueError: If the shapes differ, a value lies outside [0, 1], or there are no bins.

    Example:
        >>> table = reliability(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]), bins=2)
        >>> print(table)
        claimed         rows    mean claimed    right
        ------------  ------  --------------  -------
        0.50 to 1.00       4           0.750    0.750
    """
    probabilities, right = np.asarray(probabilities, np.float64), np.asarray(right, np.float64)
    if probabilities.ndim != 1 or probabilities.shape != right.shape or bins < 1:
        raise ValueError(
            f"Shapes {probabilities.shape} and {right.shape}, {bins} bins: expected [n] twice, at least 1."
        )
    for name, values in (("probabilities", probabilities), ("right", right)):
        outside = values[~((values >= 0) & (values <= 1))]
        if len(outside):
            raise ValueError(f"{name} must lie from 0 to 1, found {outside[0]}.")
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, probabilities, side="left") - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, probabilities, bins) / rows
        accuracy = np.bincount(place, right, bins) / rows
    # As close to 0 and 1 as rounding can tell: one mistake of a decision that was certain makes no mean infinite.
    certain = np.finfo(np.float64).eps
    claimed = np.clip(probabilities, certain, 1 - certain)
    log_loss = -(right * np.log(claimed) + (1 - right) * np.log1p(-claimed))
    scores = (float(np.mean(score)) if len(right) else math.nan for score in (log_loss, (probabilities - right) ** 2))
    return Reliability(edges, rows, confidence, accuracy, *scores)


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) with equally wide bins; arguments and errors as `reliability`.

    Example:
        >>> round(expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])), 3)
        0.4
    """
    return reliability(probabilities, right, bins).error


def recall_at_k(logits: np.ndarray, rows: TargetRows) -> dict[int, float]:
    """How often the right option is among the k likeliest, for each k of `RECALL_AT` below the number of options.

    Args:
        logits: Float [n, k], of inputs that the head has not seen.
        rows: What is known of them; those that do not settle which option is right are left out.

    Returns:
        Empty if no row does.

    Example:
        >>> logits = np.array([[3.0, 2.0, 1.0, 0.0]] * 2)
        >>> recall_at_k(logits, TargetRows.from_labels(np.array([0, 2]), 4))
        {1: 0.5, 3: 1.0}
    """
    settled, options = settled_rows(rows) & (rows.objective != Objective.REWARD), rows.target.shape[1]
    if not settled.any():
        return {}
    labels, likeliest = rows.target[settled].argmax(axis=1), np.argsort(-logits[settled], axis=1, kind="stable")
    place = (likeliest == labels[:, None]).argmax(axis=1)
    return {k: float((place < k).mean()) for k in RECALL_AT if k < options}
