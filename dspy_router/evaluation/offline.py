"""What a candidate policy would have earned on logged decisions, estimated without running it.

A log tells what was taken, with which probability, and what came of it; not what the other options would have earned.
The estimators here make up for that in four ways. π(o|x) is the candidate's probability of option o for input x, a the
option taken, μ its propensity, r its reward, w = π(a|x) / μ, and r̂(x, o) a predicted reward.

Weighting can only speak of what the log tried: `dspy_router.evaluation.overlap` says how far that goes, and
`dspy_router.evaluation.compare` gives no verdict where it is too little.

The intervals are percentiles of a bootstrap over groups of rows. They assume that groups are independent draws of what
the candidate will be asked, and many of them; rows of a group may depend on each other. Where no row contradicts
another a bootstrap has nothing to go by, and there is no interval.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap
from tqdm.auto import tqdm

from dspy_router.errors import RouteError
from dspy_router.evaluation.overlap import Overlap

RESAMPLES = 2000
BATCH_VALUES = 2_000_000  # values resampled at once, which bounds the bootstrap's memory


@dataclass(frozen=True)
class LoggedRows:
    """Logged decisions beside what a candidate policy would do: n rows, k options.

    Attributes:
        policy: Float [n, k], the candidate's probabilities; each row sums to one.
        chosen: Int [n], the options taken, in [0, k).
        propensity: Float [n], the probabilities with which they were taken. Anything outside (0, 1], NaN included,
            counts as unknown.
        reward: Float [n], finite.
        predicted: Float [n, k], the reward that a model which did not see the row predicts of each option; see
            `dspy_router.learning.reward_model.cross_fitted_rewards`.
        group: Int [n]: rows of one group (one example) are resampled together. They stand in the order of decision.

    Raises:
        RouteError: If shapes do not fit or a value is out of range.
    """

    policy: np.ndarray
    chosen: np.ndarray
    propensity: np.ndarray
    reward: np.ndarray
    predicted: np.ndarray
    group: np.ndarray

    def __post_init__(self) -> None:
        shapes, shape = {field.name: getattr(self, field.name).shape for field in fields(self)}, self.policy.shape
        expected = {name: shape if name in ("policy", "predicted") else shape[:1] for name in shapes}
        if len(shape) != 2 or shapes != expected:
            raise RouteError(f"Shapes do not fit: {shapes}; expected [n, k] for policy and predicted, [n] else.")
        for name, right, wanted in (
            ("policy", (self.policy >= 0).all(axis=1) & (np.abs(self.policy.sum(axis=1) - 1) < 1e-4), "probabilities"),
            ("chosen", (self.chosen >= 0) & (self.chosen < shape[1]), f"an index in [0, {shape[1]})"),
            ("reward", np.isfinite(self.reward), "a finite number"),
            ("predicted", np.isfinite(self.predicted).all(axis=1), "finite numbers"),
        ):
            if not right.all():
                row = int(np.flatnonzero(~right)[0])
                raise RouteError(f"Row {row} has {name} {getattr(self, name)[row]}; expected {wanted}.")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def has_propensity(self) -> np.ndarray:
        """Bool [n]: whether the propensity is one to weigh with, in (0, 1]."""
        return (self.propensity > 0) & (self.propensity <= 1)

    @property
    def weight(self) -> np.ndarray:
        """Float [n]: the importance weights w = π(a|x) / μ of rows that all have a propensity."""
        return _taken(self.policy, self.chosen) / self.propensity

    def where(self, keep: np.ndarray) -> "LoggedRows":
        """The rows at which `keep`, bool [n], is True."""
        return LoggedRows(*(getattr(self, field.name)[keep] for field in fields(self)))

    def unusable_propensities(self) -> dict[str, int]:
        """How many rows lack a propensity to weigh with, by reason."""
        reasons = {
            "propensity unknown or NaN": np.isnan(self.propensity),
            "propensity 0 or less": self.propensity <= 0,
            "propensity above 1": self.propensity > 1,
        }
        return {reason: int(found.sum()) for reason, found in reasons.items() if found.any()}


@dataclass(frozen=True)
class Contributions:
    """What each row adds to an estimate, Σ numerator / Σ denominator; both are float [n]."""

    numerator: np.ndarray
    denominator: np.ndarray


def logged_policy(rows: LoggedRows) -> Contributions:
    """The log's own policy: the mean reward, r."""
    return Contributions(rows.reward, np.ones(len(rows)))


def direct_method(rows: LoggedRows) -> Contributions:
    """The reward model's word for it: Σ_o π(o|x) r̂(x, o).

    It needs no propensities, and is as wrong as the reward model; its interval does not know of that error. (Dudík,
    Langford and Li, "Doubly Robust Policy Evaluation and Learning", 2011.)
    """
    return Contributions((rows.policy * rows.predicted).sum(axis=1), np.ones(len(rows)))


def inverse_propensity(rows: LoggedRows) -> Contributions:
    """Inverse propensity scoring: w r.

    Unbiased if the propensities are right and every option that the candidate takes had a chance. (Horvitz and
    Thompson, "A Generalization of Sampling Without Replacement from a Finite Universe", 1952.)
    """
    return Contributions(rows.weight * rows.reward, np.ones(len(rows)))


def self_normalized(rows: LoggedRows) -> Contributions:
    """SNIPS: Σ w r / Σ w.

    Slightly biased; it stays within the range of the rewards, and a constant added to all rewards moves it by just
    that constant. (Swaminathan and Joachims, "The Self-Normalized Estimator for Counterfactual Learning", 2015.)
    """
    return Contributions(rows.weight * rows.reward, rows.weight)


def doubly_robust(rows: LoggedRows) -> Contributions:
    """The direct method, corrected where the reward model erred: Σ_o π(o|x) r̂(x, o) + w (r - r̂(x, a)).

    Unbiased if either the propensities or the predicted rewards are right. (Dudík, Langford and Li, 2011.)
    """
    correction = rows.weight * (rows.reward - _taken(rows.predicted, rows.chosen))
    return Contributions(direct_method(rows).numerator + correction, np.ones(len(rows)))


Estimator = Callable[[LoggedRows], Contributions]
WITHOUT_PROPENSITY: dict[str, Estimator] = {"logged policy": logged_policy, "direct method": direct_method}
WITH_PROPENSITY: dict[str, Estimator] = {
    "IPS": inverse_propensity,
    "SNIPS": self_normalized,
    "doubly robust": doubly_robust,
}


@dataclass(frozen=True)
class Interval:
    """A figure between the ends of its bootstrap percentile interval.

    The ends are NaN where the rows do not vary in what they say of it, which makes no figure certain. They are equal
    only for a difference that is 0 by nature, that of a policy to itself.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What a policy earns.

    Attributes:
        reward: The mean reward of a decision.
        difference: `reward` less what the baseline earns on the same rows, by the same estimator: a paired
            difference. Without a baseline, less the mean logged reward.
        rows: How many rows the estimate uses.
    """

    reward: Interval
    difference: Interval
    rows: int


@dataclass(frozen=True)
class OfflineEvaluation:
    """What `evaluate_policy` found.

    Attributes:
        rows: How many there are.
        estimates: By name: "logged policy", "direct method", "IPS", "SNIPS", "doubly robust". Those that need
            propensities use the rows that have one. Without rows of two groups or more an estimator is left out.
        overlap: Of the rows that have a propensity; None if none has.
        unusable: Rows without a propensity to weigh with, by reason.
        confidence: Of the intervals.
    """

    rows: int
    estimates: Mapping[str, Estimate]
    overlap: Overlap | None
    unusable: Mapping[str, int]
    confidence: float


def evaluate_policy(
    rows: LoggedRows, *, baseline: np.ndarray | None = None, confidence: float = 0.95, seed: int = 0
) -> OfflineEvaluation:
    """Estimate what a candidate policy would have earned, by four estimators, with bootstrap intervals.

    Args:
        rows: The log beside the candidate's probabilities.
        baseline: Float [n, k], the probabilities of the policy to compare with; by default the log as it was.
        confidence: Of the intervals, in (0, 1).
        seed: Draws the bootstrap's resamples.

    Raises:
        RouteError: If `confidence` is not in (0, 1).

    Example:
        >>> chosen, luck = np.random.default_rng(0).integers(2, size=(2, 400))  # either with 0.5
        >>> reward = np.where(chosen == 1, 1.0, luck)  # option 1 earns 1, option 0 half of the time
        >>> always_second, unknown = np.tile([0.0, 1.0], (400, 1)), np.full((400, 2), 0.5)
        >>> rows = LoggedRows(always_second, chosen, np.full(400, 0.5), reward, unknown, np.arange(400))
        >>> found = evaluate_policy(rows).estimates
        >>> found["SNIPS"].reward.value, found["direct method"].reward.value, found["doubly robust"].difference.low > 0
        (1.0, 0.5, True)
        >>> found["SNIPS"].reward.low  # all that it has seen of option 1 is rewards of 1
        nan
    """
    if not 0 < confidence < 1:
        raise RouteError(f"confidence={confidence} is no probability; give one in (0, 1), such as 0.95.")
    weighted = rows.where(rows.has_propensity)
    jobs = [(rows, *entry) for entry in WITHOUT_PROPENSITY.items()]
    jobs += [(weighted, *entry) for entry in WITH_PROPENSITY.items()]
    estimates = {
        name: _estimate(estimator, used, _kept(baseline, rows, used), confidence, seed)
        for used, name, estimator in tqdm(jobs, desc="bootstrap", unit="estimate", delay=2)
        if len(np.unique(used.group)) > 1
    }
    overlap = Overlap.of(weighted) if len(weighted) else None
    return OfflineEvaluation(len(rows), estimates, overlap, rows.unusable_propensities(), confidence)


def _kept(baseline: np.ndarray | None, rows: LoggedRows, used: LoggedRows) -> np.ndarray | None:
    """The baseline's probabilities on the rows used, which are all of them or those with a propensity."""
    return baseline if baseline is None or len(used) == len(rows) else baseline[rows.has_propensity]


def _estimate(
    estimator: Estimator, rows: LoggedRows, baseline: np.ndarray | None, confidence: float, seed: int
) -> Estimate:
    """An estimate with the percentile intervals of a bootstrap that draws groups, with all their rows."""
    found = estimator(rows)
    reference = logged_policy(rows) if baseline is None else estimator(replace(rows, policy=baseline))
    group = np.unique(rows.group, return_inverse=True)[1]
    columns = np.stack([found.numerator, found.denominator, reference.numerator, reference.denominator])
    sums = [np.bincount(group, weights=column) for column in columns]

    def statistic(*sums: np.ndarray, axis: int = -1) -> np.ndarray:
        numerator, denominator, other, others = (column.sum(axis=axis) for column in sums)
        value = _ratio(numerator, denominator)
        return np.stack([value, value - _ratio(other, others)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # without any weight the ends are NaN, as they should be
        ends = bootstrap(
            sums, statistic, paired=True, vectorized=True, method="percentile", confidence_level=confidence,
            n_resamples=RESAMPLES, batch=max(1, BATCH_VALUES // len(sums[0])), rng=seed,
        ).confidence_interval  # fmt: skip
    reward, difference = np.stack([statistic(*sums), ends.low, ends.high], axis=1).tolist()
    same = estimator is logged_policy or _is_candidate(baseline, rows)
    return Estimate(_interval(*reward), Interval(*difference) if same else _interval(*difference), len(rows))


def _is_candidate(baseline: np.ndarray | None, rows: LoggedRows) -> bool:
    """Whether what the candidate is compared with is the candidate itself."""
    if baseline is not None:
        return np.array_equal(rows.policy, baseline)
    return np.array_equal(_taken(rows.policy, rows.chosen), rows.propensity)


def _interval(value: float, low: float, high: float) -> Interval:
    """An interval, without ends if it would have no width."""
    return Interval(value, math.nan, math.nan) if math.isclose(low, high, abs_tol=1e-12) else Interval(value, low, high)


def _taken(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The entry of each row of `values` [n, k] at its option in `chosen` [n]."""
    return np.take_along_axis(values, chosen[:, None], axis=1)[:, 0]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio, and NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) != 0)
