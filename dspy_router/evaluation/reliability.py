"""Pictures of how far decisions can be relied on; they need the extra `plots`.

Figures are made without `pyplot`, so that nothing global changes: `figure.savefig("reliability.png")` writes one, and a
notebook shows it after `%matplotlib inline`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from dspy_router.learning.reliability import Reliability


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Risk against coverage over every threshold of a score, from the strictest to the one that keeps all.

    Attributes:
        thresholds: Float64 [t], falling; a decision is kept if its score is at least the threshold.
        coverage: Float64 [t], share of the in-scope rows that is kept.
        risk: Float64 [t], mean loss of all rows kept.
    """

    thresholds: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray

    def coverage_at(self, risk: float) -> float:
        """The largest coverage with at most so much risk on these very rows: the best a threshold does in hindsight."""
        return float(self.coverage[self.risk <= risk].max(initial=0.0))


def risk_coverage(scores: np.ndarray, losses: np.ndarray, in_scope: np.ndarray | None = None) -> RiskCoverage:
    """The curve of decisions with scores [n], higher for surer, and losses [n].

    Args:
        scores: Float [n].
        losses: Bool or float [n]; an out-of-scope request that is kept loses.
        in_scope: Bool [n], whose share is the coverage; by default all. At least one.

    Raises:
        ValueError: If the shapes differ or no row is in scope.

    Example:
        >>> curve = risk_coverage(np.array([0.9, 0.8, 0.3]), np.array([0, 0, 1]))
        >>> curve.risk.round(2).tolist(), round(curve.coverage_at(0.1), 2)
        ([0.0, 0.0, 0.33], 0.67)
    """
    scores, losses = np.asarray(scores, np.float64), np.asarray(losses, np.float64)
    inside = np.ones(scores.shape, bool) if in_scope is None else np.asarray(in_scope, bool)
    if scores.ndim != 1 or not scores.shape == losses.shape == inside.shape or not inside.any():
        raise ValueError(f"Shapes {scores.shape}, {losses.shape}, {inside.shape}: expected [n], with rows in scope.")
    order = np.argsort(-scores, kind="stable")
    scores, losses, inside = scores[order], losses[order], inside[order]
    last = np.append(scores[1:] != scores[:-1], True)  # rows of equal score are kept together or not at all
    risk = np.cumsum(losses) / np.arange(1, len(scores) + 1)
    return RiskCoverage(scores[last], (np.cumsum(inside) / inside.sum())[last], risk[last])


def reliability_figure(tables: Mapping[str, Reliability]) -> Any:
    """A reliability diagram: how often decisions were right against what they claimed, one line a name."""
    figure, axes = _figure("probability claimed", "share that was right")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    for name, table in tables.items():
        filled = table.rows > 0
        label = f"{name}: expected calibration error {table.error:.3f}"
        axes.plot(table.confidence[filled], table.accuracy[filled], marker="o", markersize=3, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def risk_coverage_figure(curves: Mapping[str, RiskCoverage]) -> Any:
    """Risk against coverage, one curve a name."""
    figure, axes = _figure("coverage", "risk")
    for name, curve in curves.items():
        axes.plot(curve.coverage, curve.risk, label=name)
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def roc_figure(scores: Mapping[str, np.ndarray], in_scope: np.ndarray) -> Any:
    """In-scope rows kept against out-of-scope rows kept, one curve a name; scores [n] are higher for in scope.

    Raises:
        ValueError: If not both kinds of rows are there.
    """
    if np.all(in_scope) or not np.any(in_scope):
        raise ValueError("A ROC curve needs rows in scope and rows out of scope.")
    figure, axes = _figure("out-of-scope rows kept", "in-scope rows kept")
    for name, values in scores.items():
        kept_outside, kept_inside, _ = roc_curve(in_scope, values)
        axes.plot(kept_outside, kept_inside, label=f"{name}: area {roc_auc_score(in_scope, values):.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _figure(horizontal: str, vertical: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel=horizontal, ylabel=vertical)
    axes.grid(alpha=0.3)
    return figure, axes
