"""Whether a promise made earlier still holds, and whether the inputs are still those it was made for.

`RunningAudit` watches the losses of audited decisions as they come, and may be looked at after every one. `drift`
compares the scores of recent inputs with those of the inputs that the promise was calibrated on; `RunningDrift` does so
for every window of new ones.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from dspy_router.errors import RouteError

# Bets on losses above the risk, as shares of what can be staked without running into debt. A share f wins most if the
# mean loss is near α + f (1 - α): at a risk of 2 % these bets stand for 26 to 1.2 times the risk.
STAKES = 2.0 ** -np.arange(1, 9)
WINDOW = 500  # scores of inputs that are compared at once with those of the calibration rows


class RunningAudit:
    """A test of "the mean loss is at most the risk" that may be looked at after every loss.

    A wealth of 1 is bet on losses above the risk α (Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", 2024). Before loss t arrives, the reserve is drawn down to 1 / (1 + ln(t + 1)) and what was
    taken is spread over the bets λ; then the money on λ is multiplied by

        1 + λ (loss - α),    λ = 2⁻ʲ / α, j = 1..8.

    While every loss is at most α on average, given those before it, the wealth is a nonnegative supermartingale, so
    that it ever reaches 1 / `alpha` with probability `alpha` at most (Ville's inequality): `alpha` bounds the chance of
    ever raising a false alarm, however long the audit runs. The reserve is there for changes that come late, when the
    money bet before is lost. (Shin, Ramdas and Rinaldo's "E-detectors", 2024, bet a full 1 at every step: they see such
    a change sooner, but give false alarms from time to time.)

    Measured with 0/1 losses and `alpha` 0.05: twice a promised 2 % is seen after 500 losses in the median, three times
    after 130, five times after 40; of a promised 5 %, after 170, 50 and 17. After 1,000 losses at half the risk, twice
    the risk takes 1,180 (2 %) or 490 (5 %); after 10,000, 1,500 or 590. Losses at exactly the risk raised an alarm
    within 20,000 in 3 % of 2,000 runs.

    Not for several threads at once: guard `observe` with a lock.

    Args:
        risk: α, the promise, in (0, 1).
        alpha: The chance of a false alarm, in (0, 1).

    Attributes:
        rows: Losses observed.
        alarmed: Whether the wealth has reached 1 / `alpha`. It stays so, and the wealth as it was then.

    Raises:
        RouteError: If `risk` or `alpha` is not in (0, 1).

    Example:
        >>> audit = RunningAudit(risk=0.05)
        >>> any(audit.observe(0.0) for _ in range(200))
        False
        >>> alarms = [audit.observe(loss) for loss in (1.0, 0.0, 1.0, 0.0) * 5]
        >>> alarms.index(True), audit.rows, round(audit.mean, 3)
        (14, 220, 0.045)
    """

    def __init__(self, risk: float, alpha: float = 0.05) -> None:
        for name, value in (("risk", risk), ("alpha", alpha)):
            if not 0 < value < 1:
                raise RouteError(f"{name}={value!r}: expected a number in (0, 1), such as 0.05.")
        self.risk = risk
        self.alpha = alpha
        self.rows = 0
        self.alarmed = False
        self._lost = 0.0
        self._reserve = 1.0
        self._staked = np.zeros(len(STAKES))

    def observe(self, loss: float) -> bool:
        """Take note of a loss; True if the promise is refuted, by this loss or before.

        Args:
            loss: What an audited decision lost, in [0, 1]. Which decisions are audited must not depend on their losses.

        Raises:
            RouteError: If the loss is not in [0, 1].
        """
        if not 0 <= loss <= 1:
            raise RouteError(f"Loss {loss!r}: expected a number in [0, 1] (1 minus the metric).")
        self.rows += 1
        self._lost += loss
        if not self.alarmed:
            reserve = 1 / (1 + math.log(self.rows + 1))
            self._staked += (self._reserve - reserve) / len(STAKES)
            self._staked *= 1 + STAKES / self.risk * (loss - self.risk)
            self._reserve = reserve
            self.alarmed = self.wealth >= 1 / self.alpha
        return self.alarmed

    @property
    def wealth(self) -> float:
        """The evidence against the promise: 1 at first, and 1 / `alpha` or more from an alarm on."""
        return self._reserve + float(self._staked.sum())

    @property
    def mean(self) -> float | None:
        """Mean of the losses observed; None before the first."""
        return self._lost / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-compatible values."""
        return {
            "risk": self.risk,
            "alpha": self.alpha,
            "rows": self.rows,
            "alarmed": self.alarmed,
            "lost": self._lost,
            "reserve": self._reserve,
            "staked": self._staked.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "RunningAudit":
        """The audit that `to_dict` described.

        Raises:
            RouteError: If it stakes on another number of bets, as another version may have.
        """
        audit = cls(state["risk"], state["alpha"])
        if len(state["staked"]) != len(STAKES):
            raise RouteError(f"The audit has {len(state['staked'])} stakes; expected {len(STAKES)}. Start a new one.")
        audit.rows, audit.alarmed = state["rows"], state["alarmed"]
        audit._lost, audit._reserve, audit._staked = state["lost"], state["reserve"], np.array(state["staked"])
        return audit


@dataclass(frozen=True)
class DriftReport:
    """Whether two samples of scores come from one distribution.

    Attributes:
        statistic: The greatest difference of their empirical distribution functions, in [0, 1].
        p_value: The probability of one as great by chance.
        lower: Whether that difference is towards lower scores among the recent ones: less familiar inputs.
        reference_rows: Scores of the reference.
        recent_rows: Recent scores.
    """

    statistic: float
    p_value: float
    lower: bool
    reference_rows: int
    recent_rows: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return asdict(self)

    def __str__(self) -> str:
        direction = "less" if self.lower else "more"
        return (
            f"Inputs: Kolmogorov-Smirnov statistic {self.statistic:.3f} (p = {self.p_value:.2g}), {direction} familiar "
            f"than the reference ({self.recent_rows:,} recent, {self.reference_rows:,} reference rows)."
        )


def drift(reference_scores: np.ndarray, recent_scores: np.ndarray) -> DriftReport:
    """Compare recent scores with those a promise was calibrated on: the two-sample Kolmogorov-Smirnov test.

    Give it the familiarity of the inputs (see `dspy_router.learning.familiarity`): that tells how near an input is to
    the training vectors, whatever it asks for. A test on the vectors themselves, such as the kernel two-sample test,
    would also reject where nothing is wrong, because training texts come balanced over the options and requests do not;
    and it needs all vectors.

    With familiarity and log probability combined, and 1,500 of CLINC150's validation rows as reference, a fifth out of
    scope among 200 requests is found in 99 % of windows at p ≤ 0.01, a tenth in 37 % (in 84 % among 500).

    The p-value is that of one look; to look again and again there is `RunningDrift`.

    Args:
        reference_scores: Float [n], finite; of rows that were not trained on, such as the calibration rows.
        recent_scores: Float [m], finite; of the window to judge.

    Raises:
        RouteError: If either is empty, not one-dimensional or not finite.

    Example:
        >>> random = np.random.default_rng(0)
        >>> reference, usual = random.normal(size=1000), random.normal(size=200)
        >>> drift(reference, usual).p_value > 0.05
        True
        >>> unusual = np.append(usual[:160], random.normal(-3, 1, size=40))
        >>> found = drift(reference, unusual)
        >>> found.p_value < 0.001, found.lower
        (True, True)
    """
    samples = {"reference": np.asarray(reference_scores, float), "recent": np.asarray(recent_scores, float)}
    for name, values in samples.items():
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise RouteError(f"The {name} scores {values.shape} must be finite numbers, [n] with n at least 1.")
    found = ks_2samp(samples["recent"], samples["reference"])
    rows = {f"{name}_rows": len(values) for name, values in samples.items()}
    # A distribution function that lies above another belongs to the lower scores.
    return DriftReport(float(found.statistic), float(found.pvalue), bool(found.statistic_sign > 0), **rows)


class RunningDrift:
    """`drift` of every `WINDOW` new inputs, at levels that sum to the chance of ever raising a false alarm.

    Window w = 1, 2, ... is an alarm if its p-value is at most

        alpha / (w (w + 1)),    Σ_w = alpha.

    By the union bound that holds however long the test runs, and although all windows are compared with the same
    reference. It takes inputs that are independent draws: requests that come in bursts of one kind are drift to it.

    Measured on normal scores, `alpha` 0.05: inputs as before raised an alarm within 20 windows in 2 % of 300 runs with
    500 reference rows. After 10 such windows, a fifth of the inputs three deviations lower is seen in the first window
    in the median, a tenth in the twentieth.

    Not for several threads at once: guard `observe` with a lock.

    Args:
        reference_scores: Float [n], finite, n at least 1; of rows that were not trained on.
        alpha: The chance of a false alarm, in (0, 1).

    Attributes:
        rows: Scores observed.
        alarmed: Whether a window has been an alarm. It stays so.

    Raises:
        RouteError: If `alpha` is not in (0, 1).

    Example:
        >>> random = np.random.default_rng(0)
        >>> test = RunningDrift(random.normal(size=1000))
        >>> any(test.observe(score) for score in random.normal(size=2000))
        False
        >>> alarms = [test.observe(score) for score in random.normal(-0.5, 1, size=1000)]
        >>> alarms.index(True) + 1, test.report.lower
        (500, True)
    """

    def __init__(self, reference_scores: np.ndarray, alpha: float = 0.05) -> None:
        if not 0 < alpha < 1:
            raise RouteError(f"alpha={alpha!r}: expected a number in (0, 1), such as 0.05.")
        self.alpha = alpha
        self.rows = 0
        self.alarmed = False
        self._reference = np.asarray(reference_scores, float)
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def observe(self, score: float) -> bool:
        """Take note of an input's score; True if drift is found, by this window or before."""
        self.rows += 1
        self._recent.append(score)
        window, more = divmod(self.rows, WINDOW)
        if not more and not self.alarmed:
            level = self.alpha / (window * (window + 1))
            self.alarmed = drift(self._reference, np.array(self._recent)).p_value <= level
        return self.alarmed

    @property
    def report(self) -> DriftReport | None:
        """One look at the latest scores, up to `WINDOW`; None before the first."""
        return drift(self._reference, np.array(self._recent)) if self._recent else None

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-compatible values, without the reference."""
        return {"alpha": self.alpha, "rows": self.rows, "alarmed": self.alarmed, "recent": list(self._recent)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], reference_scores: np.ndarray) -> "RunningDrift":
        """The test that `to_dict` described."""
        test = cls(reference_scores, state["alpha"])
        test.rows, test.alarmed = int(state["rows"]), bool(state["alarmed"])
        test._recent.extend(float(score) for score in state["recent"])
        return test
