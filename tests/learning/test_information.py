import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_router.learning.information import (
    LARGEST_NOISE,
    RARE_SHARE,
    SMALLEST_MEASURED_NOISE,
    entropy_of,
    information,
    lift_rare_options,
    measured_noise,
)


def mutual_information(chance: float, noise: float) -> float:
    """Between "the option is right" and "it succeeded", by its definition."""
    joint = np.array([[chance * (1 - noise), chance * noise], [(1 - chance) * noise, (1 - chance) * (1 - noise)]])
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


shares = st.just(0.0) | st.floats(1e-9, 1.0)


@given(chance=shares, noise=shares.map(lambda share: share / 2))
def test_information_is_that_between_the_truth_and_the_outcome(chance: float, noise: float) -> None:
    assert information(np.array([chance]), noise)[0] == pytest.approx(mutual_information(chance, noise), abs=1e-9)


def test_a_toss_up_tells_most_and_noise_tells_less() -> None:
    chances = np.linspace(0, 1, 11)
    assert information(chances).argmax() == 5
    assert information(chances, 0.2).argmax() == 5
    assert (information(chances, 0.2)[1:-1] < information(chances)[1:-1]).all()
    assert information(chances, 0.5) == pytest.approx(np.zeros(11), abs=1e-9)


def test_entropy_is_finite_at_the_ends() -> None:
    assert entropy_of(np.array([0.0, 1.0])) == pytest.approx([0.0, 0.0], abs=1e-9)


@st.composite
def policies(draw: st.DrawFn) -> np.ndarray:
    rows, options = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    policy = np.random.default_rng(draw(st.integers(0, 2**16))).dirichlet(np.full(options, 0.3), rows)
    return policy.astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(policy=policies(), failed=st.floats(0, 200))
def test_lifting_keeps_distributions_and_the_order_within_a_column_pair(policy: np.ndarray, failed: float) -> None:
    lifted = lift_rare_options(policy, np.ones(len(policy)), np.full(policy.shape[1], failed))
    np.testing.assert_allclose(lifted.sum(axis=1), 1.0, atol=1e-4)
    # Columns are scaled as wholes, so the odds between two options keep their order from row to row.
    sure = (policy > 1e-4).all(axis=1)
    before, after = policy[sure], lifted[sure]
    if len(before) > 1:
        odds_before, odds_after = before[:, 0] / before[:, 1], after[:, 0] / after[:, 1]
        order = odds_before.argsort()
        assert (np.diff(odds_after[order]) >= -1e-3 * odds_after.max()).all()


def test_every_option_gets_its_share_unless_its_tries_failed() -> None:
    policy = np.tile([0.97, 0.02, 0.01], (100, 1)).astype(np.float32)
    policy[:10] = [0.9, 0.02, 0.08]
    even = lift_rare_options(policy, np.ones(100), np.zeros(3)).sum(axis=0)
    assert (even > 0.9 * RARE_SHARE * 100 / 3).all()
    tried = lift_rare_options(policy, np.ones(100), np.array([0.0, 0.0, 300.0])).sum(axis=0)
    assert tried[2] < 0.2 * even[2]
    assert tried[1] > 0.9 * RARE_SHARE * 100 / 3


def test_rows_where_the_rare_option_is_likeliest_come_up_first() -> None:
    policy = np.tile([0.97, 0.03], (50, 1)).astype(np.float32)
    policy[7] = [0.7, 0.3]
    assert lift_rare_options(policy, np.ones(50), np.zeros(2))[:, 1].argmax() == 7


def test_what_is_common_or_ruled_out_is_left_as_it_is() -> None:
    even = np.full((4, 2), 0.5, np.float32)
    np.testing.assert_array_equal(lift_rare_options(even, np.ones(4), np.zeros(2)), even)
    ruled_out = np.array([[0.95, 0.05, 0.0], [0.9, 0.1, 0.0]], np.float32)
    assert (lift_rare_options(ruled_out, np.ones(2), np.zeros(3))[:, 2] == 0.0).all()


def test_rows_that_count_less_ask_for_less() -> None:
    policy = np.array([[0.99, 0.01], [0.01, 0.99]], np.float32)
    light = lift_rare_options(policy, np.array([1.0, 0.01]), np.zeros(2))
    heavy = lift_rare_options(policy, np.array([1.0, 1.0]), np.zeros(2))
    assert light[0, 1] > 0.2 > heavy[0, 1]


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.3])
def test_noise_is_recovered_from_repeats(noise: float) -> None:
    random = np.random.default_rng(0)
    right = random.random(20_000) < 0.5
    looks = [right ^ (random.random(20_000) < noise) for _ in range(2)]
    assert measured_noise(list(zip(*looks, strict=True))) == pytest.approx(noise, abs=0.015)


def test_measured_noise_keeps_its_bounds() -> None:
    assert measured_noise([]) == 0.0
    assert measured_noise([(False, False)] * 9) == 0.0
    assert measured_noise([(True, False)]) == LARGEST_NOISE
    assert measured_noise([(True, True)] * 999 + [(True, False)]) == SMALLEST_MEASURED_NOISE
