import numpy as np
import pytest

from dspy_router.learning.rewards import LARGEST_WEIGHT, Tries, option_values


def tries(*entries: tuple[int, int, float, float]) -> Tries:
    """Tries given as (group, option, reward, propensity)."""
    group, option, reward, propensity = (np.array(column) for column in zip(*entries, strict=True))
    return Tries(group, option, reward, propensity)


def test_an_option_tried_is_worth_its_mean_reward_and_others_what_is_predicted() -> None:
    predicted = np.array([[0.4, 0.5, 0.6], [0.1, 0.2, 0.3]])
    found = option_values(tries((0, 0, 1.0, 1.0), (0, 0, 0.5, 1.0), (0, 2, 0.0, 0.3), (1, 1, 0.7, np.nan)), predicted)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.75, 0.5, 0.0], [0.1, 0.7, 0.3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("propensity", "worth"),
    [(0.5, 0.2 + 2 * 0.8), (0.01, 0.2 + LARGEST_WEIGHT * 0.8), (1.0, 1.0), (np.nan, 1.0), (0.0, 1.0), (1.5, 1.0)],
)
def test_only_a_lone_draw_stands_for_others(propensity: float, worth: float) -> None:
    found = option_values(tries((0, 1, 1.0, propensity)), np.array([[0.6, 0.2]]))
    np.testing.assert_allclose(found, [[0.6, worth]], rtol=1e-6)


def test_lone_draws_are_unbiased_for_any_reward_model() -> None:
    # One input drawn many times over, each draw an input of its own: the values average to the true rewards.
    random = np.random.default_rng(0)
    policy, truth = np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.2, 0.6])
    option = random.choice(3, 60_000, p=policy)
    reward = truth[option] + 0.1 * random.standard_normal(len(option))
    drawn = Tries(np.arange(len(option)), option, reward, policy[option])
    predicted = np.tile([0.9, 0.9, 0.1], (len(option), 1))
    np.testing.assert_allclose(option_values(drawn, predicted).mean(axis=0), truth, atol=0.03)


def test_mean_rewards_know_what_was_never_tried() -> None:
    mean, looks = tries((0, 0, 1.0, 1.0), (0, 0, 0.0, 1.0), (1, 1, -2.0, 1.0)).mean_rewards((2, 2))
    np.testing.assert_array_equal(mean, [[0.5, np.nan], [np.nan, -2.0]])
    assert looks.tolist() == [[2, 0], [0, 1]]


def test_noise_is_the_spread_of_repeated_tries_alone() -> None:
    assert tries((0, 0, 1.0, 1.0), (0, 1, 0.0, 1.0), (1, 0, 5.0, 1.0)).noise() == 0.0
    assert tries((0, 0, 1.0, 1.0), (0, 0, 1.0, 1.0)).noise() == 0.0
    # Two pairs, one apart by 2 and one by 0: squares about the means 1 + 1 + 0 + 0, two degrees of freedom.
    pooled = tries((0, 0, 0.0, 1.0), (0, 0, 2.0, 1.0), (1, 0, 9.0, 1.0), (1, 0, 9.0, 1.0), (1, 1, 4.0, 1.0))
    assert pooled.noise() == pytest.approx(1.0)


def test_noise_is_recovered_whatever_the_options_are_worth() -> None:
    random = np.random.default_rng(0)
    group, option = random.integers(200, size=4000), random.integers(3, size=4000)
    reward = group + 10.0 * option + 0.3 * random.standard_normal(4000)
    assert Tries(group, option, reward, np.ones(4000)).noise() == pytest.approx(0.3, abs=0.015)
