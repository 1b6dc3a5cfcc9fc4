"""Overlap by hand, and how often right and wrong propensities are doubted."""

from collections.abc import Callable

import numpy as np
import pytest

from dspy_router.evaluation.objections import DOUBT, objections
from dspy_router.evaluation.offline import LoggedRows, evaluate_policy
from dspy_router.evaluation.overlap import Overlap

OPTIONS = 4
Claim = Callable[[np.ndarray], np.ndarray]


def test_overlap_by_hand() -> None:
    policy = np.tile([0.5, 0.25, 0.25], (4, 1))
    propensity = np.array([0.5, 0.5, 0.25, 1.0])
    ones = np.ones(4)
    rows = LoggedRows(policy, np.array([0, 0, 1, 1]), propensity, ones, policy, np.arange(4))
    overlap = Overlap.of(rows)  # weights 1, 1, 1, 0.25
    assert overlap.effective_rows == pytest.approx(3.25**2 / 3.0625)
    assert overlap.largest_weight == 1
    assert overlap.mean_weight == pytest.approx(0.8125)
    assert overlap.mean_weight_error == pytest.approx(np.std([1, 1, 1, 0.25]) / 2)
    assert overlap.unsupported == 0.25  # the third option was never taken
    assert overlap.decided == 0.25
    assert overlap.unusual == 0.75 / 4  # in the row with propensity 1
    assert overlap.unusual_rows == pytest.approx(3)


def test_an_option_taken_too_rarely_has_no_support() -> None:
    ones = np.ones(200)
    policy = np.tile([0.2, 0.8], (200, 1))  # the candidate would take the second 160 times
    for taken, unsupported in ((3, 0.8), (4, 0.0)):
        chosen = (np.arange(200) < taken).astype(int)
        rows = LoggedRows(policy, chosen, np.where(chosen, 0.02, 0.98), ones, policy, np.arange(200))
        assert Overlap.of(rows).unsupported == pytest.approx(unsupported)


def explored(rows: int, share: float, seed: int, claim: Claim = np.copy) -> Overlap:
    """Overlap of a log in which a share of the decisions was drawn, with the propensities it claims.

    The candidate takes the usual option in 78 % of the rows, and elsewhere one that is drawn about once in 70 explored
    rows at a share of a tenth.
    """
    generator = np.random.default_rng(seed)
    changed = generator.random(rows) < 0.22
    sure = np.where(changed, 0.63, 0.85)
    chances = np.repeat(share * (0.8 * (1 - sure) / (OPTIONS - 1) + 0.05)[:, None], OPTIONS, axis=1)
    chances[:, 0] = 1 - chances[:, 1:].sum(axis=1)
    chosen = (generator.random(rows)[:, None] > chances.cumsum(axis=1)).sum(axis=1).clip(0, OPTIONS - 1)
    propensity = claim(chances)[np.arange(rows), chosen]
    policy, zeros = np.eye(OPTIONS)[changed.astype(int)], np.zeros((rows, OPTIONS))
    return Overlap.of(LoggedRows(policy, chosen, propensity, np.zeros(rows), zeros, np.arange(rows)))


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("rows", [100, 300, 1000])
def test_right_propensities_are_doubted_no_more_often_than_the_level_says(share: float, rows: int) -> None:
    doubts = np.array([explored(rows, share, seed).doubt for seed in range(500)])
    assert (doubts >= DOUBT).sum() <= 3  # 0.5 expected at most; four or more have a chance of 0.002
    assert (doubts >= 20).mean() <= 0.05


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize(
    "claim",
    [
        lambda right: right / 2,
        lambda right: np.full_like(right, 0.9),
        lambda right: np.full_like(right, 1 / OPTIONS),
        lambda right: 1 - right,
    ],
    ids=["half of the right ones", "nine in ten for all", "an even share for all", "those of not taking it"],
)
def test_wrong_propensities_are_seen(share: float, claim: Claim) -> None:
    assert all(explored(300, share, seed, claim).doubt >= DOUBT for seed in range(20))


def test_too_large_propensities_up_to_a_half_show_in_the_mean_weight_alone() -> None:
    overlap = explored(1000, 1.0, 0, lambda right: np.minimum(1.7 * right, 1.0))
    assert overlap.doubt < DOUBT
    assert overlap.mean_weight < 0.9


def test_repeated_rows_are_no_further_evidence() -> None:
    half = np.full((40, 2), 0.5)
    chosen, propensity = np.zeros(40, int), np.full(40, 0.45)
    doubts = [
        Overlap.of(LoggedRows(np.eye(2)[chosen], chosen, propensity, np.ones(40), half, group)).doubt
        for group in (np.arange(40), np.arange(40) // 4)
    ]
    assert doubts[0] > DOUBT > doubts[1]


def test_a_request_that_is_asked_again_until_it_is_served_right_casts_no_doubt() -> None:
    """How many rows a group has depends on its weights, and their mean is more than 1 with right propensities."""
    draws = np.random.default_rng(0).random((300, 5)) < 0.5  # of the right option
    asked = np.where(draws.any(axis=1), draws.argmax(axis=1) + 1, 5)
    group, served = np.repeat(np.arange(300), asked), draws[np.arange(5) < asked[:, None]]
    policy, half = np.tile([1.0, 0.0], (len(group), 1)), np.full(len(group), 0.5)
    rows = LoggedRows(policy, (~served).astype(int), half, served.astype(float), policy, group)
    assert Overlap.of(rows).doubt < DOUBT


@pytest.mark.parametrize("options", [3, 7])
def test_propensities_of_two_digits_are_right_enough(options: int) -> None:
    chosen, propensity = np.arange(10_000) % options, np.full(10_000, round(1 / options, 2))
    policy = np.full((10_000, options), 1 / options)
    assert Overlap.of(LoggedRows(policy, chosen, propensity, propensity, policy, np.arange(10_000))).doubt < DOUBT


def test_a_candidate_that_knows_what_was_taken_may_be_the_reason_for_doubt() -> None:
    """It learned from these rows, so that their weights are too large with right propensities."""
    chosen = np.random.default_rng(0).integers(OPTIONS, size=300)
    policy, unknown = np.eye(OPTIONS)[chosen], np.zeros((300, OPTIONS))
    rows = LoggedRows(policy, chosen, np.full(300, 1 / OPTIONS), chosen == 0, unknown, np.arange(300))
    [objection] = objections(evaluate_policy(rows))
    assert "or the candidate learned from these rows: judge it on others" in objection
