"""What a candidate policy would have earned on logged decisions, estimated without running it.

A log tells what was taken, with which probability, and what came of it; not what the other options would have earned.
The estimators here make up for that in four ways. π(o|x) is the candidate's probability of option o for input x, a the
option taken, μ its propensity, r its reward, w = π(a|x) / μ, and r̂(x, o) a predicted reward.

Weighting can only speak of what the log tried: `Overlap` says how far that goes, and `dspy_router.evaluation.compare`
gives no verdict where it is too little.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap
from tqdm.auto import tqdm

from dspy_router.errors import RouteError

RESAMPLES = 2000
BATCH_VALUES = 2_000_000  # values resampled at once, which bounds the bootstrap's memory
RARELY = 50  # an option has no support if the candidate takes it more than so many times as often as the log did


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
        group: Int [n]: rows of one group (one example) are resampled together.

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


WITHOUT_PROPENSITY = {"logged policy": logged_policy, "direct method": direct_method}
WITH_PROPENSITY = {"IPS": inverse_propensity, "SNIPS": self_normalized, "doubly robust": doubly_robust}


@dataclass(frozen=True)
class Interval:
    """A figure between the ends of its bootstrap percentile interval."""

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
class Overlap:
    """How far the log speaks of the candidate.

    Attributes:
        effective_rows: The effective sample size (Σw)² / Σw², with the weights summed in each group: how many
            independent rows of the candidate's own would be worth as much. (Kong, "A Note on Importance Sampling using
            Standardized Weights", 1992; Owen, "Monte Carlo theory, methods and examples", 2013, section 9.3.)
        unsupported: Share of the candidate's probability on options that the log never or too rarely took, in [0, 1].
        largest_weight: The largest w.
        mean_weight: The mean of w; 1, up to chance, where the log covers the candidate and the propensities are right.
        mean_weight_error: Its standard error.
        decided: Share of rows whose propensity is exactly 1: the log took no chance there.
    """

    effective_rows: float
    unsupported: float
    largest_weight: float
    mean_weight: float
    mean_weight_error: float
    decided: float

    @classmethod
    def of(cls, rows: LoggedRows) -> "Overlap":
        """The overlap of at least one row, all with a propensity.

        Example:
            >>> half, always_first = np.full(4, 0.5), np.tile([1.0, 0.0], (4, 1))
            >>> rows = LoggedRows(always_first, np.array([0, 1, 0, 1]), half, half, always_first, np.arange(4))
            >>> overlap = Overlap.of(rows)
            >>> overlap.effective_rows, overlap.largest_weight, overlap.mean_weight, overlap.unsupported
            (2.0, 2.0, 1.0, 0.0)
        """
        weight, group = rows.weight, np.unique(rows.group, return_inverse=True)[1]
        total = np.bincount(group, weights=weight)
        deviation = np.bincount(group, weights=weight - weight.mean())
        wanted = rows.policy.sum(axis=0)
        rare = RARELY * np.bincount(rows.chosen, minlength=len(wanted)) < wanted
        return cls(
            effective_rows=float(_ratio(total.sum() ** 2, (total**2).sum(), otherwise=0.0)),
            unsupported=float(wanted[rare].sum() / len(rows)),
            largest_weight=float(weight.max()),
            mean_weight=float(weight.mean()),
            mean_weight_error=float(np.sqrt((deviation**2).sum()) / len(rows)),
            decided=float((rows.propensity == 1).mean()),
        )


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
        >>> chosen = np.random.default_rng(0).integers(2, size=400)  # either with 0.5; option 1 earns 1
        >>> always_second, unknown = np.tile([0.0, 1.0], (400, 1)), np.full((400, 2), 0.5)
        >>> rows = LoggedRows(always_second, chosen, np.full(400, 0.5), chosen * 1.0, unknown, np.arange(400))
        >>> found = evaluate_policy(rows).estimates
        >>> found["SNIPS"].reward.value, found["direct method"].reward.value, found["doubly robust"].difference.low > 0
        (1.0, 0.5, True)
    """
    if not 0 < confidence < 1:
        raise RouteError(f"confidence={confidence} is no probability; give one in (0, 1), such as 0.95.")
    weighted = rows.where(rows.has_propensity)
    jobs = [(rows, *entry) for entry in WITHOUT_PROPENSITY.items()]
    jobs += [(weighted, *entry) for entry in WITH_PROPENSITY.items()]
    estimates = {
        name: _estimate(estimator(used), _reference(estimator, used, rows, baseline), used, confidence, seed)
        for used, name, estimator in tqdm(jobs, desc="bootstrap", unit="estimate", delay=2)
        if len(np.unique(used.group)) > 1
    }
    overlap = Overlap.of(weighted) if len(weighted) else None
    return OfflineEvaluation(len(rows), estimates, overlap, rows.unusable_propensities(), confidence)


def _reference(
    estimator: Callable[[LoggedRows], Contributions], used: LoggedRows, rows: LoggedRows, baseline: np.ndarray | None
) -> Contributions:
    """What the baseline earns on the used rows, by the same estimator."""
    if baseline is None:
        return logged_policy(used)
    kept = baseline if len(used) == len(rows) else baseline[rows.has_propensity]
    return estimator(replace(used, policy=kept))


def _estimate(
    found: Contributions, reference: Contributions, rows: LoggedRows, confidence: float, seed: int
) -> Estimate:
    """An estimate with the percentile intervals of a bootstrap that draws groups, with all their rows."""
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
    return Estimate(Interval(*reward), Interval(*difference), len(rows))


def _taken(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The entry of each row of `values` [n, k] at its option in `chosen` [n]."""
    return np.take_along_axis(values, chosen[:, None], axis=1)[:, 0]


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """The ratio, and `otherwise` where `below` is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), otherwise), where=np.asarray(below) != 0)
