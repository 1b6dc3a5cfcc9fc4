"""How far a log speaks of a candidate, and whether its propensities can be right.

π(o|x) is the candidate's probability of option o for input x, a the option taken, μ its propensity, w = π(a|x) / μ.

If the propensities are right, whatever the inputs, three figures of a row have a mean of at most 1 over the draw of a:

- w: the importance weight. Its mean is 1 if the log gives every option that the candidate takes a chance, less if not.
- 1 / (k μ): the sum over the k options of their probability times this is the share of those that had a chance.
- 1[μ > 1/2] / μ: at most one option has more than half.

Too small propensities raise the first two, too large ones the third. None can be below 0, so 1 can be bet on each being
larger: Π (1 + λ (figure - 1)) has a mean of at most 1 for any λ in [0, 1], however rare and heavy the weights are.
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024.) A standard error would not
do: where exploration is rare the weights that make up the mean are mostly not in the log, nor in its variance.
A mean weight that is too low cannot be told from exploration that is too rare, and does not count as evidence.

Each group bets once, on its first row. Later ones may repeat its draw, and how many there are may depend on it: where
a request that was served wrongly is asked again, the mean weight of a group is more than 1 with right propensities.
What `TOLERANCE` allows for is no evidence either, as 0.33 for a third: bets would find it out in some thousand rows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dspy_router.evaluation.offline import LoggedRows

RARELY = 50  # an option has no support if the candidate takes it more than so many times as often as the log did
TOLERANCE = 0.02  # relative, of the figures: propensities of two digits mostly are as right as this
STAKES = 2.0 ** -np.arange(1, 9)  # the λ, over which the wealth is averaged


@dataclass(frozen=True)
class Overlap:
    """How far the log speaks of the candidate.

    Attributes:
        effective_rows: The effective sample size (Σw)² / Σw², with the weights summed in each group: how many
            independent rows of the candidate's own would be worth as much. (Kong, "A Note on Importance Sampling using
            Standardized Weights", 1992; Owen, "Monte Carlo theory, methods and examples", 2013, section 9.3.)
        unsupported: Share of the candidate's probability on options that the log never or too rarely took, in [0, 1].
        largest_weight: The largest w.
        mean_weight: The mean of w; 1, up to chance, where the log covers the candidate and the propensities are right.
        mean_weight_error: Its standard error, which is too small where rows of large weight are rare.
        decided: Share of rows whose propensity is exactly 1: the log took no chance there.
        unusual: Share of the candidate's decisions against an option that the log takes more than half of the time for
            such an input, the mean of 1[μ > 1/2] (1 - π(a|x)) / μ.
        unusual_rows: The effective sample size of the rows with μ ≤ 1/2: at most this is what the log tells of those.
        doubt: Evidence against the propensities, an e-value: if they are right, up to rounding, it is c or more with
            probability 1 / c at most, for any c and any number of rows.
    """

    effective_rows: float
    unsupported: float
    largest_weight: float
    mean_weight: float
    mean_weight_error: float
    decided: float
    unusual: float
    unusual_rows: float
    doubt: float

    @classmethod
    def of(cls, rows: "LoggedRows") -> "Overlap":
        """The overlap of at least one row, all with a propensity.

        Example:
            >>> from dspy_router.evaluation.offline import LoggedRows
            >>> half, always_first = np.full(4, 0.5), np.tile([1.0, 0.0], (4, 1))
            >>> rows = LoggedRows(always_first, np.array([0, 1, 0, 1]), half, half, always_first, np.arange(4))
            >>> overlap = Overlap.of(rows)
            >>> overlap.effective_rows, overlap.largest_weight, overlap.mean_weight, overlap.unsupported
            (2.0, 2.0, 1.0, 0.0)
        """
        weight, group = rows.weight, np.unique(rows.group, return_inverse=True)[1]
        usual, options = rows.propensity > 0.5, rows.policy.shape[1]
        deviation = np.bincount(group, weights=weight - weight.mean())
        wanted = rows.policy.sum(axis=0)
        rare = RARELY * np.bincount(rows.chosen, minlength=len(wanted)) < wanted
        figures = np.stack([weight, 1 / (options * rows.propensity), usual / rows.propensity])
        return cls(
            effective_rows=_effective(weight, group),
            unsupported=float(wanted[rare].sum() / len(rows)),
            largest_weight=float(weight.max()),
            mean_weight=float(weight.mean()),
            mean_weight_error=float(np.sqrt((deviation**2).sum()) / len(rows)),
            decided=float((rows.propensity == 1).mean()),
            unusual=min(1.0, float((usual * (1 / rows.propensity - weight)).mean())),
            unusual_rows=_effective(weight * ~usual, group),
            doubt=_doubt(figures, group),
        )


def _effective(weight: np.ndarray, group: np.ndarray) -> float:
    """The effective sample size, 0 without any weight."""
    total = np.bincount(group, weights=weight)
    squares = float((total**2).sum())
    return float(total.sum() ** 2 / squares) if squares else 0.0


def _doubt(figures: np.ndarray, group: np.ndarray) -> float:
    """The mean wealth of bets that figures [m, n], of mean 1 at most, are larger; a group bets on its first row."""
    first = np.unique(group, return_index=True)[1]
    log_wealth = np.log1p(STAKES[:, None, None] * (figures[:, first] / (1 + TOLERANCE) - 1)).sum(axis=-1)
    return float(np.exp(np.minimum(log_wealth, 700)).mean())  # e^700 is still a float
