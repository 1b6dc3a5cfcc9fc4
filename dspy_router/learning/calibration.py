"""Calibration: probabilities that are right as often as they say.

A head is calibrated on rows it was not fitted to, by a temperature T and, where there is data enough, a bias an option:

    calibrated logits = logits / T + b

T minimises the loss of the held-out rows (Guo et al. 2017, "On Calibration of Modern Neural Networks") and of one error
more, spread over what would have been the likeliest wrong option of each:

    Σ_rows loss - mean_rows log p(likeliest wrong option)

Where no held-out row is wrong, the first sum alone is smallest at T = 0: certainty about everything. With the error, n
right ones of n are as good as n of n + 1 (Platt 1999, "Probabilistic Outputs for Support Vector Machines", smooths his
targets likewise). Of none, this, half an error, an error at any wrong option and a normal prior on log T, with 250 to
5,000 rows on validation rows of SNIPS, BANKING77 and CLINC150, the expected calibration error hardly differed (0.024 to
0.025 on average); the loss fell from 0.433 to 0.427.

Options with at least `ROWS_A_BIAS` of the rows, each of another group, also get a bias, with a standard normal prior,
but only if that lowers the loss in cross-validation over the held-out rows.

Rows whose targets are rewards take no part: the expected reward is highest where T is 0, whatever the truth.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.model_selection import KFold

from dspy_router.heads import OptionHead
from dspy_router.learning.rows import Objective, TargetRows
from dspy_router.threads import threads_for

FEWEST_ROWS = 50  # a temperature from fewer is mostly noise
HELD_OUT_SHARE = 0.2
ROWS_A_BIAS = 20
SETTLED = 0.9  # of the likelihood: an option with as much of it is what the row is about
LARGEST_LOG_TEMPERATURE = 3.0
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """What turns a head's logits into calibrated ones.

    Attributes:
        temperature: Divides the logits; above 1 where the head was too sure of itself.
        bias: Float32 [k], added after that; zero for options with too little data.
        rows: Held-out rows it was fitted to.
        loss_before: Their mean loss without it.
        loss: Their mean loss with it; these are the rows it was fitted to.
        cross_fitted: Float32 [rows, k], their calibrated logits, each by a fit to other rows; None if all are of one
            group.
    """

    temperature: float
    bias: np.ndarray
    rows: int
    loss_before: float
    loss: float
    cross_fitted: np.ndarray | None

    @property
    def at_bound(self) -> bool:
        """Whether the temperature is as far from 1 as is allowed, so that no value of it fits well."""
        return abs(float(np.log(self.temperature))) > LARGEST_LOG_TEMPERATURE - 0.01

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits, of the shape and type of `logits` [n, k]."""
        return (logits / self.temperature + self.bias).astype(logits.dtype)

    def apply(self, head: OptionHead) -> None:
        """Change a head in place so that its logits are the calibrated ones. Apply it once."""
        with torch.no_grad():
            head.temperature.mul_(self.temperature)
            head.bias.add_(torch.from_numpy(self.bias) * head.temperature)


def held_out(groups: Sequence[Hashable], seed: int = 0) -> np.ndarray | None:
    """A seeded fifth of the rows to calibrate on, in whole groups.

    Rows of one group, such as the steps of one task, resemble one another: a head that has learned from some of them is
    surer of the others, and more often right, than it will be of a new task.

    Args:
        groups: The group of each row.
        seed: Of the draw.

    Returns:
        Bool [n], true in a fifth of the rows or a little more; None if a fifth is fewer than `FEWEST_ROWS`, or all rows
        are one group.

    Example:
        >>> int(held_out(range(1000)).sum()), held_out(range(100))
        (200, None)
        >>> mask = held_out([row // 10 for row in range(1000)])
        >>> int(mask.sum()), set(mask.reshape(100, 10).sum(axis=1).tolist())
        (200, {0, 10})
    """
    count = int(HELD_OUT_SHARE * len(groups))
    sizes = np.bincount(group := _numbered(groups))
    if count < FEWEST_ROWS or len(sizes) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = np.searchsorted(sizes[order].cumsum(), count) + 1
    return np.isin(group, order[: min(taken, len(sizes) - 1)])


def calibrate(
    logits: np.ndarray, rows: TargetRows, *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Calibration | None:
    """Fit temperature and biases to rows that the head has not seen.

    Args:
        logits: Float [n, k], the head's.
        rows: What is known of the n inputs.
        groups: The group of each, as for `held_out`; by default each is its own.
        seed: Of the split of the cross-validation, which keeps groups together.

    Returns:
        None if fewer than `FEWEST_ROWS` rows are of use: leave the head as it is.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> random = np.random.default_rng(0)
        >>> logits = random.standard_normal((1000, 3)).astype(np.float32)
        >>> labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn by softmax(logits)
        >>> overconfident = calibrate(3 * logits, TargetRows.from_labels(labels, 3))
        >>> round(overconfident.temperature)
        3
    """
    if logits.shape != rows.target.shape:
        raise ValueError(f"Logits {logits.shape} and targets {rows.target.shape}: expected the same, [n, k].")
    useful = useful_rows(rows)
    if useful.sum() < FEWEST_ROWS:
        return None
    group = _numbered(range(len(rows)) if groups is None else groups)[useful]
    logits, rows = np.asarray(logits[useful], np.float32), rows.part(useful)
    with threads_for(logits.size):
        # Only errors show that an option is claimed too often.
        wrong = rows.worth(logits.argmax(axis=1)) < 1
        options = _options_with_bias(rows, group) if wrong.any() else np.zeros(0, int)
        crossed = _cross_fitted(logits, rows, options[:0], group, seed)
        if len(options) and crossed is not None:
            biased = _cross_fitted(logits, rows, options, group, seed)
            assert biased is not None
            if _loss(biased, rows) < _loss(crossed, rows):
                crossed = biased
            else:
                options = options[:0]
        temperature, bias = _fitted(logits, rows, options)
        loss = _loss(logits / temperature + bias, rows)
        return Calibration(temperature, bias, len(rows), _loss(logits, rows), loss, crossed)


def useful_rows(rows: TargetRows) -> np.ndarray:
    """Bool [n]: rows that say which option is right, and not only what one earns."""
    return np.asarray((rows.objective != Objective.REWARD) & (rows.weight > 0))


def settled_rows(rows: TargetRows) -> np.ndarray:
    """Bool [n]: rows that are about one option, by nearly all of their target."""
    return np.asarray(rows.target.max(axis=1) >= SETTLED * rows.target.sum(axis=1))


def _numbered(groups: Sequence[Hashable]) -> np.ndarray:
    """Int [n]: the groups by number, in the order in which they first come."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups], int)


def _options_with_bias(rows: TargetRows, group: np.ndarray) -> np.ndarray:
    """Options with data enough, where the rows of one group, int [n], count once: they are no independent evidence."""
    settled = settled_rows(rows)
    pairs = np.unique(np.stack([group, rows.target.argmax(axis=1)], axis=1)[settled], axis=0)
    return np.flatnonzero(np.bincount(pairs[:, 1], minlength=rows.target.shape[1]) >= ROWS_A_BIAS)


def _cross_fitted(
    logits: np.ndarray, rows: TargetRows, options: np.ndarray, group: np.ndarray, seed: int
) -> np.ndarray | None:
    """Logits of each row as the other folds of the groups, int [n], calibrate them; None if there is but one group."""
    groups, found = np.unique(group), np.empty_like(logits)
    if len(groups) < 2:
        return None
    for _, left in KFold(min(FOLDS, len(groups)), shuffle=True, random_state=seed).split(groups):
        test = np.isin(group, groups[left])
        temperature, bias = _fitted(logits[~test], rows.part(~test), options)
        found[test] = logits[test] / temperature + bias
    return found


def _loss(logits: np.ndarray, rows: TargetRows) -> float:
    return float(rows.loss()(torch.from_numpy(logits.astype(np.float32))))


def _with_an_error(logits: np.ndarray, rows: TargetRows) -> tuple[np.ndarray, TargetRows]:
    """The rows, and behind them each again as if its likeliest wrong option were right; those count as one."""
    wrong = np.where(rows.target >= 0.5 * rows.target.max(axis=1, keepdims=True), -np.inf, logits)
    some = np.isfinite(wrong).any(axis=1)
    errors = TargetRows.from_labels(wrong[some].argmax(axis=1), wrong.shape[1])
    weight = rows.weight[some] / rows.weight[some].sum()
    errors = TargetRows.of(Objective.LIKELIHOOD, errors.target, weight)
    return np.concatenate([logits, logits[some]]), TargetRows.joined([rows, errors])


def _fitted(logits: np.ndarray, rows: TargetRows, options: np.ndarray) -> tuple[float, np.ndarray]:
    """Temperature and biases [k] with the smallest loss; the biases of other than some options are 0."""
    logits, rows = _with_an_error(logits, rows)
    loss, given = rows.loss(), torch.from_numpy(logits)
    bounds = (-LARGEST_LOG_TEMPERATURE, LARGEST_LOG_TEMPERATURE)
    with torch.no_grad():
        found = minimize_scalar(lambda log: float(loss(given / np.exp(log))), bounds=bounds, options={"xatol": 1e-3})
    bias = np.zeros(logits.shape[1], np.float32)
    if not len(options):
        return float(np.exp(found.x)), bias
    count, places = float(rows.weight.sum()), torch.from_numpy(options)

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        shift = torch.zeros(logits.shape[1]).index_add(0, places, parameters[1:])
        total = loss(given / parameters[0].exp() + shift) + parameters[1:].square().sum() / (2 * count)
        total.backward()
        assert parameters.grad is not None
        return float(total.detach()), parameters.grad.double().numpy()

    start = np.concatenate([[found.x], np.zeros(len(options))])
    limits = [bounds] + [(None, None)] * len(options)
    values = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": 100}).x
    bias[options] = values[1:]
    return float(np.exp(values[0])), bias
