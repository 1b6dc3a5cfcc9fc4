import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from dspy_router.errors import RouteError
from dspy_router.learning.risk import risk_threshold, rows_needed

SHARES = (np.arange(2000) + 0.5) / 2000  # of the population, from the highest score down
DRAWS = 600


def broken(chance_of_loss: np.ndarray, *, risk: float, delta: float, rows: int, graded: bool = False) -> float:
    """Share of calibration draws whose threshold keeps decisions that lose more than the risk."""
    expected = np.cumsum(chance_of_loss) / np.arange(1, len(SHARES) + 1)
    count = 0
    for seed in range(DRAWS):
        random = np.random.default_rng(seed)
        place = random.integers(len(SHARES), size=rows)
        chance = chance_of_loss[place]
        losses = random.beta(0.5, 0.5 / chance - 0.5) if graded else (random.random(rows) < chance).astype(float)
        found = risk_threshold(-SHARES[place], losses, risk=risk, delta=delta, seed=seed)
        if found.threshold is not None:
            count += expected[np.searchsorted(SHARES, -found.threshold)] > risk
    return count / DRAWS


def not_more_often_than(delta: float) -> float:
    """What a share of DRAWS exceeds by chance once in a thousand, if it is `delta` in truth."""
    return float(binom.ppf(0.999, DRAWS, delta)) / DRAWS


@pytest.mark.parametrize(
    "chance_of_loss",
    [
        pytest.param(0.02 + 0.2 * SHARES, id="rises"),
        pytest.param(np.full(2000, 0.1001), id="just above everywhere"),
        pytest.param(0.103 + 0.1 * np.sin(40 * SHARES), id="waves"),
        pytest.param(np.select([SHARES < 0.15, SHARES < 0.17], [0.04, 0.9], 0.1002), id="jumps where the tests start"),
        pytest.param(np.where(SHARES < 0.1, 0.3, np.where(SHARES < 0.5, 0.05, 0.2)), id="worst at the top"),
    ],
)
@pytest.mark.parametrize("graded", [False, True])
def test_the_promise_is_broken_in_at_most_delta_of_the_draws(chance_of_loss: np.ndarray, graded: bool) -> None:
    share = broken(chance_of_loss, risk=0.1, delta=0.1, rows=400, graded=graded)
    assert share <= not_more_often_than(0.1)


@pytest.mark.parametrize(
    ("share", "chance_of_loss"),
    [
        pytest.param([0.9499, 0.0501], [0.0, 1.0], id="one score is always lost"),
        pytest.param([0.8999, 0.1001], [0.0, 0.5], id="one score is lost half of the time"),
        pytest.param([0.0501, 0.9499], [1.0, 0.0], id="the highest score is lost"),
        pytest.param([0.025, 0.9499, 0.0251], [1.0, 0.0, 1.0], id="the highest and the lowest are lost"),
        pytest.param([0.05] * 20, [0.0, 0.1002] * 10, id="every other score"),
    ],
)
def test_the_promise_holds_where_many_rows_have_one_score(share: list[float], chance_of_loss: list[float]) -> None:
    mass, chance = np.array(share), np.array(chance_of_loss)
    expected = np.cumsum(mass * chance) / np.cumsum(mass)
    count = 0
    for seed in range(DRAWS):
        random = np.random.default_rng(seed)
        place = random.choice(len(mass), size=100, p=mass)
        losses = (random.random(100) < chance[place]).astype(float)
        found = risk_threshold(-place.astype(float), losses, risk=0.05, delta=0.05, seed=seed)
        count += found.threshold is not None and expected[int(-found.threshold)] > 0.05
    assert count / DRAWS <= not_more_often_than(0.05)


def test_a_test_without_a_fixed_sequence_would_break_it() -> None:
    # The check above can fail: the most lenient of all thresholds that pass alone is wrong more often.
    wrong = 0
    for seed in range(DRAWS):
        losses = np.random.default_rng(seed).random(400) < 0.1001
        kept = np.arange(1, 401)
        wrong += bool((binom.cdf(np.cumsum(losses), kept, 0.1) <= 0.1)[22:].any())
    assert wrong / DRAWS > not_more_often_than(0.1)


def test_coverage_nears_the_best_threshold_with_more_rows() -> None:
    chance_of_loss = 0.02 + 0.2 * SHARES  # 10 % are lost among the first 80 %
    coverage = []
    for rows in (200, 1000, 5000):
        found = []
        for seed in range(40):
            random = np.random.default_rng(seed)
            place = random.integers(len(SHARES), size=rows)
            losses = (random.random(rows) < chance_of_loss[place]).astype(float)
            found.append(risk_threshold(-SHARES[place], losses, risk=0.1, delta=0.1).coverage)
        coverage.append(np.mean(found))
    assert coverage[0] > 0.2
    assert coverage[1] > 0.5
    assert 0.7 < coverage[2] < 0.8


def test_zero_one_losses_have_the_bound_of_clopper_and_pearson() -> None:
    random = np.random.default_rng(0)
    scores = random.random(1000)
    losses = (random.random(1000) > scores**0.1).astype(float)
    found = risk_threshold(scores, losses, risk=0.05, delta=0.1)
    assert found.threshold is not None
    kept = losses[scores >= found.threshold]
    assert len(kept) == found.kept
    lost = kept.sum()
    assert found.bound == pytest.approx(beta.ppf(0.9, lost + 1, len(kept) - lost))
    assert found.bound <= 0.05
    assert found.loss == kept.mean()
    assert found.coverage == (scores >= found.threshold).mean()


def test_the_threshold_is_the_last_before_the_first_test_that_fails() -> None:
    losses = np.zeros(300)
    losses[200:] = 1.0  # the 200 surest are right
    found = risk_threshold(-np.arange(300.0), losses, risk=0.1, delta=0.1)
    failed = next(k for k in range(1, 100) if binom.cdf(k, 200 + k, 0.1) > 0.1)
    assert found.kept == 200 + failed - 1
    assert found.threshold == -(found.kept - 1)


def test_losses_of_small_variance_are_kept_that_a_binomial_test_would_not() -> None:
    random = np.random.default_rng(0)
    losses = random.uniform(0.05, 0.13, 1000)  # mean 0.09
    assert binom.cdf(round(losses.sum()), 1000, 0.1) > 0.1
    found = risk_threshold(random.random(1000), losses, risk=0.1, delta=0.1)
    assert found.loss_kind == "graded"
    assert found.kept == 1000
    assert found.bound is not None
    assert losses.mean() < found.bound <= 0.1


def test_nearly_zero_one_losses_are_kept_by_rounding() -> None:
    random = np.random.default_rng(0)
    losses = (random.random(2000) < 0.07).astype(float)
    whole = risk_threshold(random.random(2000), losses, risk=0.1, delta=0.05)
    losses[np.flatnonzero(losses)[:5]] = 0.5
    found = risk_threshold(random.random(2000), losses, risk=0.1, delta=0.05)
    assert (whole.kept, found.kept) == (2000, 2000)
    assert whole.bound is not None
    assert found.bound == pytest.approx(whole.bound, abs=0.004)


def test_a_loss_that_does_not_depend_on_the_score_is_promised_by_all_rows_together() -> None:
    # The strictest threshold keeps too few rows to tell 0.035 from 0.05; the later starts do not.
    kept, at_start = [], []
    for seed in range(50):
        random = np.random.default_rng(seed)
        losses = (random.random(3000) < 0.035).astype(float)
        found = risk_threshold(random.random(3000), losses, risk=0.05, delta=0.05)
        kept.append(found.kept == 3000)
        at_start.append(binom.cdf(round(found.start_loss * found.start), found.start - 1, 0.05) <= 0.04)
    assert np.mean(at_start) < 0.7
    assert np.mean(kept) > 0.85


def test_rows_of_one_score_are_kept_or_declined_together() -> None:
    random = np.random.default_rng(0)
    scores = np.repeat([4.0, 3.0, 2.0, 1.0], 200)
    losses = (random.random(800) < np.repeat([0.0, 0.02, 0.3, 0.3], 200)).astype(float)
    found = risk_threshold(scores, losses, risk=0.05, delta=0.05)
    assert (found.threshold, found.kept) == (3.0, 400)
    order = random.permutation(800)
    again = risk_threshold(scores[order], losses[order], risk=0.05, delta=0.05)
    assert (again.threshold, again.bound is not None) == (3.0, True)


def test_without_a_threshold_that_keeps_the_promise_all_are_declined() -> None:
    losses = (np.random.default_rng(0).random(500) < 0.2).astype(float)
    found = risk_threshold(np.arange(500.0), losses, risk=0.05, delta=0.05)
    assert (found.threshold, found.kept, found.coverage, found.loss, found.bound) == (None, 0, 0.0, None, None)
    assert found.start_loss == pytest.approx(losses[-found.start :].mean())


@pytest.mark.parametrize(("risk", "delta"), [(0.02, 0.05), (0.05, 0.05), (0.1, 0.01), (0.5, 0.5), (0.9, 0.9)])
def test_as_many_rows_as_needed_are_enough_and_one_less_is_refused(risk: float, delta: float) -> None:
    rows = rows_needed(risk, delta)
    assert (1 - risk) ** (rows - 1) <= 0.8 * delta < (1 - risk) ** (rows - 2)
    for enough in (rows, rows + 1, 2 * rows):
        assert risk_threshold(np.arange(float(enough)), np.zeros(enough), risk=risk, delta=delta).kept == enough
    with pytest.raises(RouteError, match=f"{rows} are needed"):
        risk_threshold(np.arange(rows - 1.0), np.zeros(rows - 1), risk=risk, delta=delta)


def test_graded_losses_need_more_rows() -> None:
    assert rows_needed(0.02, 0.05, loss_kind="graded") == math.ceil(math.log(0.8 * 0.025) / math.log(0.98)) + 1
    losses = np.zeros(160)
    losses[0] = 0.5
    with pytest.raises(RouteError, match="195 are needed"):
        risk_threshold(np.arange(160.0), losses, risk=0.02, delta=0.05)


def test_the_same_seed_gives_the_same_threshold() -> None:
    random = np.random.default_rng(0)
    scores, losses = random.integers(9, size=600).astype(float), random.beta(0.1, 2, size=600)
    first, second = (risk_threshold(scores, losses, risk=0.1, delta=0.1, seed=5) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("scores", "losses", "message"),
    [
        ([1.0, np.nan], [0.0, 0.0], "Row 1 has score nan"),
        ([1.0, -np.inf], [0.0, 0.0], "Row 1 has score -inf"),
        ([1.0, 2.0], [0.0, 1.5], "Row 1 has loss 1.5"),
        ([1.0, 2.0], [-0.1, 0.0], r"Row 0 has loss -0.1; expected a number in \[0, 1\]"),
        ([1.0, 2.0], [0.0, np.nan], "Row 1 has loss nan"),
        ([1.0, 2.0], [0.0], r"\(2,\) and losses \(1,\)"),
        ([], [], "0 calibration rows"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(scores: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        risk_threshold(np.array(scores), np.array(losses), risk=0.05, delta=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_risk_and_delta_must_be_probabilities(value: float) -> None:
    with pytest.raises(RouteError, match="risk="):
        rows_needed(value, 0.05)
    with pytest.raises(RouteError, match="delta="):
        risk_threshold(np.arange(500.0), np.zeros(500), risk=0.05, delta=value)
