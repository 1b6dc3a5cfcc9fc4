import time

import numpy as np
import pytest

from dspy_router.errors import RouteError
from dspy_router.learning.reward_model import cross_fitted_rewards, fit_reward_model

DIMENSION = 16


def unit_vectors(count: int, seed: int = 0, dimension: int = DIMENSION) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def linear_log(count: int, options: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, options taken at random, their rewards, and every option's expected reward, linear in the vector."""
    generator = np.random.default_rng(seed)
    vectors = unit_vectors(count, seed)
    expected = 0.5 + vectors @ generator.normal(0, 0.5, (options, DIMENSION)).T + generator.normal(0, 0.3, options)
    chosen = generator.integers(options, size=count)
    reward = expected[np.arange(count), chosen] + generator.normal(0, 0.1, count)
    return vectors, chosen, reward, expected


def test_every_options_reward_is_recovered_from_the_options_taken() -> None:
    vectors, chosen, reward, expected = linear_log(3000, 4)
    predicted = cross_fitted_rewards(vectors, chosen, reward, 4, np.arange(3000))
    assert predicted.dtype == np.float32
    assert predicted.shape == (3000, 4)
    assert ((predicted - expected) ** 2).mean() < 0.05 * expected.var()


def test_a_row_is_predicted_by_a_model_that_did_not_see_it() -> None:
    vectors, chosen, reward, _ = linear_log(60, 3)
    groups = np.arange(60) // 2
    predicted = cross_fitted_rewards(vectors, chosen, reward, 3, groups)
    # Whatever the rows of one group earned, within the range of the rewards, their own predictions stay as they were.
    for group in (0, 7, 29):
        other = np.where(groups == group, reward.mean(), reward)
        changed = cross_fitted_rewards(vectors, chosen, other, 3, groups)
        np.testing.assert_array_equal(changed[groups == group], predicted[groups == group])
        assert not np.array_equal(changed, predicted)


def test_a_seed_repeats_the_folds_and_another_draws_others() -> None:
    vectors, chosen, reward, _ = linear_log(100, 3)
    first, again, other = (
        cross_fitted_rewards(vectors, chosen, reward, 3, np.arange(100), seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_option_never_taken_is_predicted_as_all_options_are() -> None:
    vectors, chosen, reward, _ = linear_log(400, 2)
    both, three = (fit_reward_model(vectors, chosen, reward, options) for options in (2, 3))
    np.testing.assert_array_equal(three.predict(vectors)[:, :2], both.predict(vectors))
    apart = np.abs(three.predict(vectors) - three.predict(vectors)[:, 2:]).mean(axis=0)
    assert apart[2] == 0
    assert apart[:2].min() > 0.05


def test_an_option_taken_once_stays_near_what_all_options_earn() -> None:
    vectors = unit_vectors(201)
    chosen = np.array([0] * 200 + [1])
    reward = np.array([0.5] * 100 + [0.6] * 100 + [1.0])
    predicted = fit_reward_model(vectors, chosen, reward, 2).predict(vectors[:-1])
    assert np.abs(predicted[:, 1] - predicted[:, 0]).max() < 0.1


def test_predictions_stay_within_the_range_of_the_rewards() -> None:
    vectors, chosen, reward, _ = linear_log(300, 3)
    predicted = fit_reward_model(vectors, chosen, reward, 3).predict(100 * vectors)
    assert predicted.min() == pytest.approx(reward.min(), abs=1e-6)
    assert predicted.max() == pytest.approx(reward.max(), abs=1e-6)


def test_fewer_groups_than_folds_are_enough() -> None:
    vectors, chosen, reward, _ = linear_log(30, 2)
    assert np.isfinite(cross_fitted_rewards(vectors, chosen, reward, 2, np.arange(30) % 2)).all()


def test_many_options_take_seconds() -> None:
    generator, vectors = np.random.default_rng(0), unit_vectors(1000, dimension=384)
    started = time.perf_counter()
    cross_fitted_rewards(vectors, generator.integers(150, size=1000), generator.random(1000), 150, np.arange(1000))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.array([0.0, np.nan, 1.0])}, "Row 1 has reward nan"),
        ({"chosen": np.array([0, 1, 2])}, r"Row 2 took option 2; expected an index in \[0, 2\)"),
        ({"chosen": np.array([0, 1])}, r"chosen \(2,\)"),
        ({"groups": np.zeros(3, int)}, "1 of them distinct"),
        ({"groups": np.arange(2)}, "2 group keys"),
        ({"folds": 1}, "1 folds"),
        ({"vectors": np.zeros((0, 4)), "chosen": np.zeros(0, int), "reward": np.zeros(0)}, "at least one row"),
    ],
)
def test_what_cannot_be_fitted_is_named(change: dict[str, np.ndarray], message: str) -> None:
    given = {"vectors": unit_vectors(3), "chosen": np.array([0, 1, 0]), "reward": np.ones(3), "groups": np.arange(3)}
    with pytest.raises(RouteError, match=message):
        cross_fitted_rewards(**(given | change), options=2)
