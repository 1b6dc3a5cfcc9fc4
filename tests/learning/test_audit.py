import json
import math

import numpy as np
import pytest

from dspy_router.errors import RouteError
from dspy_router.learning.audit import WINDOW, RunningAudit, RunningDrift, drift


def alarm_after(losses: np.ndarray, *, risk: float = 0.05, alpha: float = 0.1) -> int | None:
    """Losses observed up to the alarm, it included."""
    audit = RunningAudit(risk, alpha)
    return next((row for row, loss in enumerate(losses, 1) if audit.observe(float(loss))), None)


def test_a_promise_kept_raises_an_alarm_in_at_most_alpha_of_the_runs_however_long() -> None:
    random = np.random.default_rng(0)
    alarms = [alarm_after(random.random(1000) < 0.05) is not None for _ in range(200)]
    # In truth below 0.1, with which 200 runs show more than 0.17 once in a thousand times.
    assert np.mean(alarms) <= 0.17


def test_no_false_alarm_where_losses_depend_on_the_past() -> None:
    # Each loss has the mean promised, given those before it: a loss is followed by many small ones.
    random, alarms = np.random.default_rng(0), []
    for _ in range(100):
        loss, losses = 0.0, []
        for _ in range(500):
            loss = 0.05 if loss == 1.0 else float(random.random() < 0.05)
            losses.append(loss)
        alarms.append(alarm_after(np.array(losses)) is not None)
    assert np.mean(alarms) <= 0.2


def test_twice_the_risk_is_seen_after_some_hundred_losses() -> None:
    random = np.random.default_rng(0)
    found = [alarm_after(random.random(2000) < 0.1, alpha=0.05) for _ in range(60)]
    assert None not in found
    assert np.median([row for row in found if row is not None]) < 250


def test_a_change_after_a_long_good_time_is_seen() -> None:
    random = np.random.default_rng(0)
    found = [
        alarm_after(np.append(random.random(3000) < 0.02, random.random(1000) < 0.15), alpha=0.05) for _ in range(10)
    ]
    assert all(row is not None and 3000 < row < 3500 for row in found)


def test_graded_losses_above_the_risk_are_seen_sooner_for_their_small_variance() -> None:
    random = np.random.default_rng(0)
    graded = alarm_after(random.uniform(0.05, 0.15, 2000))
    assert graded is not None
    assert graded < np.median([alarm_after(random.random(2000) < 0.1) or 2000 for _ in range(20)])


def test_wealth_is_a_fair_game_at_exactly_the_risk() -> None:
    # One step: the mean wealth over the two outcomes is the wealth before.
    audit = RunningAudit(0.2, alpha=0.001)
    for loss in (0.0, 1.0, 0.3):
        audit.observe(loss)
    before = audit.wealth
    after = []
    for loss in (0.0, 1.0):
        copy = RunningAudit.from_dict(audit.to_dict())
        copy.observe(loss)
        after.append(copy.wealth)
    assert 0.8 * after[0] + 0.2 * after[1] == pytest.approx(before)


def test_an_alarm_stays_and_the_count_goes_on() -> None:
    audit = RunningAudit(0.05)
    assert audit.mean is None
    assert audit.wealth == 1.0
    while not audit.observe(1.0):
        pass
    at_alarm, rows = audit.wealth, audit.rows
    assert at_alarm >= 20
    assert all(audit.observe(0.0) for _ in range(5000))
    assert (audit.wealth, audit.rows) == (at_alarm, rows + 5000)
    assert audit.mean == pytest.approx(rows / (rows + 5000))


def test_the_state_survives_json() -> None:
    losses = np.random.default_rng(0).random(300) < 0.08
    whole, first = RunningAudit(0.05), RunningAudit(0.05)
    for loss in losses[:100]:
        first.observe(float(loss))
    second = RunningAudit.from_dict(json.loads(json.dumps(first.to_dict())))
    for loss in losses:
        whole.observe(float(loss))
    for loss in losses[100:]:
        second.observe(float(loss))
    assert second.to_dict() == whole.to_dict()


def test_a_state_with_other_bets_is_refused() -> None:
    state = RunningAudit(0.05).to_dict()
    with pytest.raises(RouteError, match="3 stakes"):
        RunningAudit.from_dict({**state, "staked": [0.1, 0.1, 0.1]})


@pytest.mark.parametrize("loss", [-0.01, 1.01, math.nan, math.inf])
def test_a_loss_outside_its_range_is_refused_and_not_counted(loss: float) -> None:
    audit = RunningAudit(0.05)
    with pytest.raises(RouteError, match=r"expected a number in \[0, 1\]"):
        audit.observe(loss)
    assert audit.rows == 0


@pytest.mark.parametrize(("risk", "alpha"), [(0.0, 0.05), (1.0, 0.05), (0.05, 0.0), (0.05, math.nan)])
def test_risk_and_alpha_must_be_probabilities(risk: float, alpha: float) -> None:
    with pytest.raises(RouteError, match=r"expected a number in \(0, 1\)"):
        RunningAudit(risk, alpha)


def test_drift_is_seen_where_some_inputs_are_unfamiliar_and_not_where_all_are_as_before() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=2000)
    usual = [drift(reference, random.normal(size=200)).p_value for _ in range(100)]
    assert np.mean(np.array(usual) <= 0.05) <= 0.12
    unusual = np.append(random.normal(size=160), random.normal(-3, 1, size=40))
    found = drift(reference, unusual)
    assert found.p_value < 0.001
    assert found.lower
    assert (found.reference_rows, found.recent_rows) == (2000, 200)
    assert "less familiar" in str(found)


def test_drift_towards_familiar_inputs_says_so() -> None:
    random = np.random.default_rng(0)
    found = drift(random.normal(size=500), random.normal(1, 1, size=100))
    assert found.p_value < 0.001
    assert not found.lower
    assert "more familiar" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["recent_rows"] == 100


@pytest.mark.parametrize("scores", [[], [[1.0]], [1.0, math.nan]])
def test_scores_that_cannot_be_compared_are_refused(scores: list[float]) -> None:
    with pytest.raises(RouteError, match="The recent scores"):
        drift(np.arange(5.0), np.array(scores))
    with pytest.raises(RouteError, match="The reference scores"):
        drift(np.array(scores), np.arange(5.0))


def drift_found_in(test: RunningDrift, windows: list[np.ndarray]) -> int | None:
    """Number of the window, from 1, in which drift is found."""
    for number, window in enumerate(windows, 1):
        for score in window:
            test.observe(float(score))
        if test.alarmed:
            return number
    return None


def test_inputs_as_before_raise_an_alarm_in_at_most_alpha_of_the_runs() -> None:
    alarms = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        # A reference of this size is all the harder to tell from, as all windows are compared with it.
        test = RunningDrift(random.normal(size=150), alpha=0.1)
        alarms += drift_found_in(test, list(random.normal(size=(8, WINDOW)))) is not None
    # In truth below 0.1, with which 100 runs show more than 20 once in a thousand times.
    assert alarms <= 20


def test_inputs_of_few_distinct_scores_raise_none_either() -> None:
    random = np.random.default_rng(0)
    found = [
        drift_found_in(RunningDrift(random.integers(3, size=500)), list(random.integers(3, size=(8, WINDOW))))
        for _ in range(20)
    ]
    assert found.count(None) >= 17


def test_a_fifth_of_strange_inputs_is_seen_within_two_windows() -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        test, windows = RunningDrift(random.normal(size=500)), random.normal(size=(12, WINDOW))
        windows[10:][random.random((2, WINDOW)) < 0.2] -= 3
        assert drift_found_in(test, list(windows)) in (11, 12)
        assert test.report is not None
        assert test.report.lower


def test_the_levels_of_all_windows_sum_to_alpha() -> None:
    # A window whose p-value lies between two levels is an alarm only while the level is the larger.
    reference, window = np.arange(500.0), np.append(np.arange(0.0, 450, 1), np.full(50, -1.0))
    p_value = drift(reference, window).p_value
    assert 0.05 / 6 < p_value < 0.05 / 2
    first = RunningDrift(reference)
    assert drift_found_in(first, [window]) == 1
    later = RunningDrift(reference)
    assert drift_found_in(later, [reference, window]) is None


def test_the_state_of_the_drift_survives_json() -> None:
    random = np.random.default_rng(0)
    reference, scores = random.normal(size=300), random.normal(-1, 1, size=700)
    whole, first = RunningDrift(reference), RunningDrift(reference)
    for score in scores[:300]:
        first.observe(score)
    second = RunningDrift.from_dict(json.loads(json.dumps(first.to_dict())), reference)
    assert [whole.observe(score) for score in scores][300:] == [second.observe(score) for score in scores[300:]]
    assert second.to_dict() == whole.to_dict()
    assert second.alarmed


@pytest.mark.parametrize("alpha", [0.0, 1.0, math.nan])
def test_the_chance_of_a_false_drift_must_be_a_probability(alpha: float) -> None:
    with pytest.raises(RouteError, match="alpha="):
        RunningDrift(np.zeros(3), alpha)
