"""From calibration rows to a threshold that keeps a promise about the loss.

A decision is kept if its score is at least the threshold. Lowering the threshold keeps more of them; how far can it be
lowered so that the expected loss R(t) = E[loss | score ≥ t] stays within a risk α? This is a family of hypotheses
H(t): R(t) > α, tested in a fixed order, from strict to lenient, until one cannot be rejected (fixed-sequence testing;
Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021). The last rejected is the answer.

The statement. With probability at least 1 - δ over the draw of the calibration rows (and of what the seed draws),
R(threshold) ≤ α, or there is no threshold. It holds for any scores and any number of rows; R need not rise as the
threshold falls.

What it takes:
- Calibration rows and future requests are independent draws of one distribution (of one exchangeable sequence: then R
  is the risk given what that sequence has in common). Drift, and rows chosen for being easy or hard, break it.
- The score, the decisions and all that the loss depends on were fixed before the rows were seen: no row of them was
  trained on or used to choose a setting.
- Losses are 0 or 1 by nature if those of all rows are; a graded metric that happened to give nothing else is tested
  as if it could not, at δ where it should be δ / 2.
- One threshold from one set of rows. Several, of which the best is taken, need a smaller δ each (δ / how many).
- The average is over all decisions kept. It says nothing of a single request, nor of a kind of requests.

No row is spent on a grid of thresholds, because every real number is tested: the p-value changes only at the scores,
so that the sequence runs through the calibration rows from the highest score down. The score of row k can be the
threshold if the losses of the first k - 1 rows were rejected, which speak of it, and those of the first k: a score may
be that of many future requests, of which row k is the only one seen. Among few rows one unlucky loss ends a sequence,
so there are three, which start at a k that depends on the number of rows alone and share δ (`SHARES`). One that arrives
at the start of the next hands its level on (the fallback procedure; Wiens and Dmitrienko, 2005), so that nearly nothing
is lost by the split.

The thresholds are random ones, so here is why the promise holds. Let ties be broken at random, and call the places in
that order of all requests u, from 0 to 1. R(u), the mean loss up to u, is continuous, and {R > α} is a union of
intervals with R = α at their ends. Given how many rows lie between the ends of all intervals, the rows up to an end b
come in groups of independent losses with mean α each. Let s be the place of a start, row k. A threshold with R > α is
only returned if there is

1. one interval that holds s, and the first k - 1 rows were rejected. Given s too, those between the interval's
   beginning and s have a mean loss above α, because R(s) > α; or
2. no such interval, and the first rows up to b were rejected, where b begins the first interval after s that holds a
   row, or that begins amid requests of one score. (The threshold keeps all of these: they may reach into the interval
   though none of the rows does. This is what the loss of row k is needed for.)

Either way, losses with a mean of at least α each are rejected at a level, which has no more than its probability. If
the next sequence starts before b, its interval is the same, and the test has the sum of the levels: together, δ.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dspy_router.errors import RouteError

LossKind = Literal["0/1", "graded"]

# Of δ, for sequences that start at the geometric mean of all rows and the fewest that can keep the promise, halfway
# between there and all rows, and at all rows.
SHARES = (0.8, 0.1, 0.1)
# Bets against graded losses, as shares of what can be staked without running into debt.
STAKES = 2.0 ** -np.arange(5)


@dataclass(frozen=True)
class RiskThreshold:
    """A threshold on a score, and what the calibration rows said of it.

    Attributes:
        threshold: Decisions with at least this score are kept; None if no threshold keeps the promise, so that all
            are to be declined.
        risk: The most that decisions kept may lose on average.
        delta: The probability, over the calibration draw, with which that may fail.
        rows: Calibration rows.
        kept: Those at or above the threshold.
        loss: Mean loss of the kept; None without a threshold.
        bound: Upper bound of the expected loss at this threshold, at most `risk`, from the rows kept. Its level is
            1 - δ for a threshold fixed beforehand (Clopper and Pearson's for 0/1 losses); what is promised of this one
            is `risk`.
        loss_kind: Of the calibration rows; it decides how they are tested.
        start: Rows kept by the strictest threshold tested.
        start_loss: Their mean loss.
    """

    threshold: float | None
    risk: float
    delta: float
    rows: int
    kept: int
    loss: float | None
    bound: float | None
    loss_kind: LossKind
    start: int
    start_loss: float

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that are kept."""
        return self.kept / self.rows


def risk_threshold(
    scores: np.ndarray, losses: np.ndarray, *, risk: float, delta: float, seed: int = 0
) -> RiskThreshold:
    """The most lenient threshold that keeps the expected loss of kept decisions within `risk`.

    The promise, what it assumes and why it holds stand in the module's text. Losses that are all 0 or 1 are taken to be
    so by nature, and tested with the exact binomial tail, P(Bin(n, α) ≤ Σ losses): Clopper and Pearson's bound is its
    inverse. Graded losses get two tests, each at level δ / 2:

    - The same, after every loss was rounded to 0 or 1 at random, to 1 with the loss as probability, which leaves its
      mean as it is (Schlag, "A new method for constructing exact tests without making any assumptions", 2008). It is
      tighter than Hoeffding and Bentkus' bound, and the best where losses are nearly 0/1.
    - Betting, which profits from a small variance, as where a judge gives almost every answer nearly full marks. With

          W = mean_j Π_i (1 + λ_j (α - loss_i)),    λ_j = 2⁻ʲ / (1 - α), j = 0..4,

      E[W] ≤ 1 under the hypothesis, so that 1 / W is a p-value (Waudby-Smith and Ramdas, "Estimating means of bounded
      random variables by betting", 2024).

    Of δ, 0.8 goes to a start at the geometric mean of all rows and the fewest that can keep the promise: with fewer,
    one unlucky loss ends it; with more, a route that is right on few requests never starts. The later starts serve
    where the loss hardly depends on the score, as with a noisy metric.

    Args:
        scores: Float [n], finite; higher means surer.
        losses: Float [n], in [0, 1]: what each decision loses if it is kept.
        risk: α, in (0, 1).
        delta: δ, in (0, 1).
        seed: Orders rows of equal score, and rounds graded losses.

    Raises:
        RouteError: If a value is out of range, or there are fewer rows than `rows_needed`.

    Example:
        >>> random = np.random.default_rng(0)
        >>> sure = random.random(2000)  # as likely right as the score says
        >>> wrong = (random.random(2000) > sure ** 0.1).astype(float)
        >>> found = risk_threshold(sure, wrong, risk=0.05, delta=0.05)
        >>> round(found.threshold, 2), found.kept, round(found.loss, 3), round(found.bound, 3)
        (0.34, 1317, 0.039, 0.049)
    """
    scores, losses = np.asarray(scores, np.float64), np.asarray(losses, np.float64)
    _check(scores, losses)
    kind: LossKind = "0/1" if np.isin(losses, (0.0, 1.0)).all() else "graded"
    rows, fewest = len(scores), rows_needed(risk, delta, loss_kind=kind)
    if rows < fewest:
        raise RouteError(
            f"{rows:,} calibration rows cannot promise a risk of {risk:g} with delta {delta:g}: even if none of them "
            f"lost anything, {fewest:,} are needed, and several times as many for a useful coverage. Give more rows, "
            "or ask for less."
        )
    random = np.random.default_rng(seed)
    shuffled = random.permutation(rows)
    order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    ranked, lost = scores[order], losses[order]
    rounded = (random.random(rows) < lost).astype(np.float64)
    start = math.isqrt(fewest * rows)
    allowed = _allowed(_log_p_values(lost, rounded, risk, kind), delta, start)
    # A threshold keeps all rows of its score or none.
    whole = np.append(ranked[1:] != ranked[:-1], True)
    kept = int(np.flatnonzero(allowed & whole).max(initial=-1)) + 1
    return RiskThreshold(
        threshold=float(ranked[kept - 1]) if kept else None,
        risk=risk,
        delta=delta,
        rows=rows,
        kept=kept,
        loss=float(lost[:kept].mean()) if kept else None,
        bound=_bound(lost[:kept], rounded[:kept], risk, delta, kind) if kept else None,
        loss_kind=kind,
        start=start,
        start_loss=float(lost[:start].mean()),
    )


def rows_needed(risk: float, delta: float, *, loss_kind: LossKind = "0/1") -> int:
    """The fewest calibration rows with which a promise is possible: with no loss in any, all are kept.

    That is log(0.8 δ) / log(1 - α), with δ / 2 if losses are graded, and one more that sets the threshold.

    Raises:
        RouteError: If `risk` or `delta` is not in (0, 1).

    Example:
        >>> rows_needed(0.02, 0.05), rows_needed(0.05, 0.05), rows_needed(0.02, 0.05, loss_kind="graded")
        (161, 64, 195)
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise RouteError(f"{name}={value!r}: expected a number in (0, 1), such as 0.05.")
    level = SHARES[0] * (delta if loss_kind == "0/1" else delta / 2)
    return math.ceil(math.log(level) / math.log1p(-risk)) + 1


def _allowed(log_p_values: np.ndarray, delta: float, start: int) -> np.ndarray:
    """Which rows' scores may be the threshold: bool [n], from the p-values of the first 1, 2, ... n rows."""
    rows = len(log_p_values)
    starts = (start, (start + rows) // 2, rows)
    allowed, level = np.zeros(rows, bool), 0.0
    for first, following, share in zip(starts, (*starts[1:], rows + 1), SHARES, strict=True):
        level += share * delta
        # From the first - 1 rows above the start to the rows up to the next one.
        failed = np.flatnonzero(log_p_values[first - 2 : following - 1] > math.log(level))
        end = following
        if len(failed):
            end, level = max(first, first + int(failed[0]) - 1), 0.0
        allowed[first - 1 : end - 1] = True
    return allowed


def _log_p_values(losses: np.ndarray, rounded: np.ndarray, risk: float, kind: LossKind) -> np.ndarray:
    """Log p-values of "the mean loss is above the risk", for the first 1, 2, ... n rows: float64 [n]."""
    from scipy.stats import binom  # needed here alone, and heavy: a route that only decides does without

    tail = binom.logcdf(np.cumsum(rounded), np.arange(1, len(rounded) + 1), risk)
    if kind == "0/1":
        return tail
    with np.errstate(divide="ignore"):  # the largest stake is lost to a loss of 1
        growth = np.log1p(STAKES[:, None] / (1 - risk) * (risk - losses))
    wealth = np.logaddexp.reduce(np.cumsum(growth, axis=1), axis=0) - math.log(len(STAKES))
    return np.minimum(math.log(2) + np.minimum(tail, -wealth), 0.0)


def _bound(losses: np.ndarray, rounded: np.ndarray, risk: float, delta: float, kind: LossKind) -> float:
    """The smallest risk that is rejected at level δ, given that `risk` is."""
    from scipy.optimize import brentq

    def excess(level: float) -> float:
        return float(_log_p_values(losses, rounded, level, kind)[-1] - math.log(delta))

    return float(brentq(excess, 0.0, risk))


def _check(scores: np.ndarray, losses: np.ndarray) -> None:
    if scores.ndim != 1 or scores.shape != losses.shape:
        raise RouteError(f"Scores {scores.shape} and losses {losses.shape}: expected one of each a row, [n] and [n].")
    for name, values, right, wanted in (
        ("score", scores, np.isfinite(scores), "a finite number"),
        ("loss", losses, (losses >= 0) & (losses <= 1), "a number in [0, 1] (1 minus the metric)"),
    ):
        if not right.all():
            row = int(np.flatnonzero(~right)[0])
            raise RouteError(f"Row {row} has {name} {values[row]}; expected {wanted}.")
