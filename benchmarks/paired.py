"""Two methods on the same requests: differences with intervals that use the pairing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """A figure between the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedShares:
    """How often the first and the second method are right on the same requests.

    Attributes:
        difference: Share right of the first less that of the second, with the percentile bootstrap over requests.
        only_first: Requests that the first alone gets right.
        only_second: Requests that the second alone gets right.
        p_value: Of McNemar's exact two-sided test that each is as likely as the other to be the one that is right.
    """

    difference: Interval
    only_first: int
    only_second: int
    p_value: float


def wilson(right: int, count: int) -> Interval:
    """A share with its Wilson interval."""
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return Interval(right / count, float(interval.low), float(interval.high))


def compare_right(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> PairedShares:
    """Compare two methods by which requests they get right."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
    discordant = only_first + only_second
    return PairedShares(
        difference=bootstrapped(np.mean, differences, seed=seed),
        only_first=only_first,
        only_second=only_second,
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    )


def ratio_of_totals(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Interval:
    """The first's total over the second's, such as seconds or tokens; requests are resampled with both their values."""
    return bootstrapped(
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis), np.asarray(first, float), np.asarray(second, float),
        seed=seed,
    )  # fmt: skip


def bootstrapped(statistic: Any, *columns: np.ndarray, seed: int) -> Interval:
    """A statistic of paired columns with its percentile bootstrap interval."""
    value = float(statistic(*columns, axis=-1))
    # scipy has no interval for one row, nor for rows that do not vary.
    if len(columns[0]) < 2 or all(np.ptp(column) == 0 for column in columns):
        return Interval(value, value, value)
    found = bootstrap(
        columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=500, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(found.low), float(found.high))
