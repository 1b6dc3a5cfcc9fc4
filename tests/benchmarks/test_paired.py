"""The arithmetic of paired comparisons, against figures worked out by other means."""

from math import comb, sqrt

import numpy as np
import paired
import pytest


def test_wilson_matches_the_published_formula() -> None:
    right, count, z = 8, 10, 1.959964
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    found = paired.wilson(right, count)
    assert (found.value, found.low, found.high) == pytest.approx((share, middle - half, middle + half), abs=1e-6)


def test_only_requests_on_which_two_methods_differ_count() -> None:
    first, second = [True] * 89 + [False] * 11, [True] * 80 + [False] * 9 + [True] * 2 + [False] * 9
    found = paired.compare_right(first, second)
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(2 * sum(comb(11, k) for k in range(3)) / 2**11)
    deviation = sqrt(9 + 2 - (9 - 2) ** 2 / 100) / 100
    assert found.difference.value == pytest.approx(0.07)
    assert found.difference.low == pytest.approx(0.07 - 1.96 * deviation, abs=0.011)
    assert found.difference.high == pytest.approx(0.07 + 1.96 * deviation, abs=0.011)
    assert found == paired.compare_right(first, second)


def test_methods_that_never_differ() -> None:
    found = paired.compare_right([True, False], [True, False])
    assert found.difference == paired.Interval(0, 0, 0)
    assert found.p_value == 1


def test_a_ratio_of_pairs_is_surer_than_its_parts() -> None:
    rng = np.random.default_rng(0)
    load = rng.lognormal(sigma=1, size=100)  # the machine's load, which both meet
    found = paired.ratio_of_totals(50 * load, load * rng.uniform(0.9, 1.1, 100))
    assert 49 < found.low < found.value < found.high < 51
    of_strangers = paired.ratio_of_totals(50 * load, rng.permutation(load))
    assert of_strangers.high - of_strangers.low > 10 * (found.high - found.low)


def test_one_request_has_no_interval() -> None:
    assert paired.ratio_of_totals([3.0], [2.0]) == paired.Interval(1.5, 1.5, 1.5)
