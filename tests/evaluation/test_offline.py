"""Estimators against the exact answer of a small bandit whose every reward is known."""

from dataclasses import replace

import numpy as np
import pytest

from dspy_router.errors import RouteError
from dspy_router.evaluation import offline
from dspy_router.evaluation.offline import LoggedRows, evaluate_policy
from dspy_router.evaluation.overlap import Overlap

INPUTS = 3
EXPECTED = np.array([[0.9, 0.2], [0.1, 0.7], [0.5, 0.4]])  # reward of either option on each input
CANDIDATE = np.array([[1.0, 0.0], [0.25, 0.75], [0.6, 0.4]])
LOGGING = np.array([[0.3, 0.7], [0.8, 0.2], [0.5, 0.5]])
TRUTH = float((CANDIDATE * EXPECTED).sum() / INPUTS)


def drawn(count: int, seed: int = 0, predicted: np.ndarray = EXPECTED) -> LoggedRows:
    """A log of 0/1 rewards, as many rows as asked for."""
    generator = np.random.default_rng(seed)
    inputs = generator.integers(INPUTS, size=count)
    chosen = (generator.random(count) < LOGGING[inputs, 1]).astype(int)
    reward = (generator.random(count) < EXPECTED[inputs, chosen]).astype(float)
    propensity = LOGGING[inputs, chosen]
    return LoggedRows(CANDIDATE[inputs], chosen, propensity, reward, predicted[inputs], np.arange(count))


def every_outcome(predicted: np.ndarray) -> tuple[LoggedRows, np.ndarray]:
    """Each input with each option taken, the reward at its mean, and the probability of that row."""
    inputs, chosen = np.repeat(np.arange(INPUTS), 2), np.tile([0, 1], INPUTS)
    propensity = LOGGING[inputs, chosen]
    rows = LoggedRows(
        CANDIDATE[inputs], chosen, propensity, EXPECTED[inputs, chosen], predicted[inputs], np.arange(len(chosen))
    )
    return rows, propensity / INPUTS


def test_ips_is_unbiased() -> None:
    rows, probability = every_outcome(EXPECTED)
    assert (probability * offline.inverse_propensity(rows).numerator).sum() == pytest.approx(TRUTH)


@pytest.mark.parametrize("error", [0.0, 0.3, -5.0])
def test_doubly_robust_is_unbiased_whatever_the_reward_model(error: float) -> None:
    rows, probability = every_outcome(EXPECTED + error * np.array([1.0, -2.0]))
    assert (probability * offline.doubly_robust(rows).numerator).sum() == pytest.approx(TRUTH)


def test_doubly_robust_is_exact_in_every_row_with_an_exact_reward_model_and_wrong_propensities() -> None:
    rows, _ = every_outcome(EXPECTED)
    rows = replace(rows, propensity=rows.propensity**2)
    found = offline.doubly_robust(rows).numerator
    np.testing.assert_allclose(found, (rows.policy * rows.predicted).sum(axis=1))
    assert found.mean() == pytest.approx(TRUTH)
    assert offline.inverse_propensity(rows).numerator.mean() != pytest.approx(TRUTH)


def test_the_direct_method_is_as_wrong_as_the_reward_model() -> None:
    for error in (0.0, 0.25):
        rows, _ = every_outcome(EXPECTED + error)
        assert offline.direct_method(rows).numerator.mean() == pytest.approx(TRUTH + error)


def test_a_constant_added_to_all_rewards_moves_snips_by_just_that_and_blows_up_ips() -> None:
    rows = drawn(200)
    plain, shifted = (evaluate_policy(replace(rows, reward=rows.reward + c)).estimates for c in (0.0, 10.0))
    assert shifted["SNIPS"].reward.value == pytest.approx(plain["SNIPS"].reward.value + 10)
    assert shifted["SNIPS"].difference.low == pytest.approx(plain["SNIPS"].difference.low)
    widths = [found["IPS"].difference.high - found["IPS"].difference.low for found in (plain, shifted)]
    assert widths[1] > 5 * widths[0]


def test_a_candidate_that_is_the_logging_policy_earns_what_was_logged() -> None:
    rows = drawn(300)
    rows = replace(rows, policy=np.eye(2)[rows.chosen], propensity=np.ones(300))
    for name in ("IPS", "SNIPS", "doubly robust"):
        difference = evaluate_policy(rows).estimates[name].difference
        assert (difference.value, difference.low, difference.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_intervals_cover_the_truth_and_shrink_with_the_square_root_of_the_rows() -> None:
    few, many = (evaluate_policy(drawn(count, seed=3)).estimates for count in (400, 6400))
    for name in ("IPS", "SNIPS", "doubly robust"):
        narrow, wide = many[name].reward, few[name].reward
        assert wide.low < TRUTH < wide.high
        assert narrow.low < TRUTH < narrow.high
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.2)


def test_the_share_of_intervals_that_cover_the_truth_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "RESAMPLES", 300)
    covers = []
    for seed in range(150):
        found = evaluate_policy(drawn(250, seed), confidence=0.8).estimates["doubly robust"].reward
        covers.append(found.low <= TRUTH <= found.high)
    assert 0.7 < np.mean(covers) < 0.9  # three standard errors of a share of 150


def test_the_interval_of_the_difference_is_that_of_paired_rows() -> None:
    # The candidate takes what was logged but for a tenth of the rows, so most of the noise is common to both.
    rows = drawn(500)
    changed = np.arange(500) % 10 == 0
    policy = np.where(changed[:, None], np.eye(2)[1 - rows.chosen], np.eye(2)[rows.chosen])
    rows = replace(rows, policy=policy, propensity=np.where(changed, rows.propensity, 1.0))
    found = evaluate_policy(rows).estimates["doubly robust"]
    assert found.difference.high - found.difference.low < 0.5 * (found.reward.high - found.reward.low)


def test_rows_of_a_group_are_resampled_together() -> None:
    rows = drawn(300)
    repeated = LoggedRows(*(np.repeat(getattr(rows, name), 4, axis=0) for name in vars(rows)))
    single, grouped = (evaluate_policy(found).estimates["doubly robust"].reward for found in (rows, repeated))
    assert grouped.value == pytest.approx(single.value)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=1e-6)
    assert Overlap.of(repeated).effective_rows == pytest.approx(Overlap.of(rows).effective_rows)


def test_a_seed_repeats_the_intervals() -> None:
    first, again, other = (evaluate_policy(drawn(100), seed=seed).estimates["IPS"] for seed in (0, 0, 1))
    assert first == again != other


def test_rows_without_a_propensity_serve_the_direct_method_alone_and_are_counted_by_reason() -> None:
    rows = drawn(100)
    propensity = rows.propensity.copy()
    propensity[:6] = [np.nan, 0.0, -0.5, 1.5, np.inf, np.nan]
    found = evaluate_policy(replace(rows, propensity=propensity))
    assert found.unusable == {"propensity unknown or NaN": 2, "propensity 0 or less": 2, "propensity above 1": 2}
    assert {name: estimate.rows for name, estimate in found.estimates.items()} == {
        "logged policy": 100, "direct method": 100, "IPS": 94, "SNIPS": 94, "doubly robust": 94
    }  # fmt: skip
    whole = evaluate_policy(rows.where(np.arange(100) >= 6)).estimates
    assert found.estimates["doubly robust"] == whole["doubly robust"]


def test_without_any_propensity_there_is_the_direct_method_and_no_overlap() -> None:
    found = evaluate_policy(replace(drawn(50), propensity=np.full(50, np.nan)))
    assert set(found.estimates) == {"logged policy", "direct method"}
    assert found.overlap is None


def test_where_nothing_the_candidate_takes_was_tried_ips_is_0_and_snips_is_no_number() -> None:
    rows = drawn(50)
    found = evaluate_policy(replace(rows, policy=np.eye(2)[1 - rows.chosen]))
    assert found.estimates["IPS"].reward.value == 0
    assert np.isnan(found.estimates["IPS"].reward.high)
    assert np.isnan(found.estimates["SNIPS"].reward.value)
    assert found.overlap is not None
    assert found.overlap.effective_rows == 0


def test_where_rows_do_not_vary_there_is_no_interval() -> None:
    rows = drawn(200)
    always_second, never = np.tile([0.0, 1.0], (200, 1)), np.eye(2)[1 - rows.chosen]
    lucky = replace(rows, policy=always_second, reward=np.where(rows.chosen == 1, 1.0, rows.reward))
    found = evaluate_policy(lucky).estimates["SNIPS"].reward
    assert found.value == 1
    assert np.isnan([found.low, found.high]).all()
    # The candidate and the baseline differ in what was never tried alone.
    half = np.arange(200) < 100
    policy, baseline = never, np.where(half[:, None], never, np.full((200, 2), 0.5))
    silent = replace(rows, policy=policy, reward=np.where(half, rows.reward, 0.0))
    difference = evaluate_policy(silent, baseline=baseline).estimates["IPS"].difference
    assert difference.value == 0
    assert np.isnan([difference.low, difference.high]).all()


def test_only_a_policy_and_itself_differ_by_0_for_certain() -> None:
    rows = drawn(200)
    for estimate in evaluate_policy(rows, baseline=rows.policy).estimates.values():
        assert (estimate.difference.value, estimate.difference.low, estimate.difference.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": np.array([[0.5, 0.5], [0.5, 0.6]])}, r"Row 1 has policy \[0.5 0.6\]; expected probabilities"),
        ({"policy": np.array([[1.5, -0.5], [0.5, 0.5]])}, "Row 0 has policy"),
        ({"chosen": np.array([0, 2])}, r"Row 1 has chosen 2; expected an index in \[0, 2\)"),
        ({"reward": np.array([np.inf, 0.0])}, "Row 0 has reward inf; expected a finite number"),
        ({"predicted": np.full((2, 2), np.nan)}, "Row 0 has predicted"),
        ({"propensity": np.ones(3)}, r"'propensity': \(3,\)"),
    ],
)
def test_rows_that_are_none_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    half = np.full((2, 2), 0.5)
    rows = {"policy": half, "chosen": np.array([0, 1]), "propensity": np.ones(2), "reward": np.ones(2)}
    with pytest.raises(RouteError, match=message):
        LoggedRows(**(rows | {"predicted": half, "group": np.arange(2)} | change))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_that_is_no_probability_is_refused(confidence: float) -> None:
    with pytest.raises(RouteError, match=f"confidence={confidence}"):
        evaluate_policy(drawn(10), confidence=confidence)
