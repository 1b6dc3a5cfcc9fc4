import numpy as np
import pytest

from dspy_router.learning.mahalanobis import RelativeMahalanobis

DIMENSION, OPTIONS = 200, 3


def drawn(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that differ in the first twenty directions, around the centres of their options, and the options."""
    random = np.random.default_rng(seed)
    options = np.arange(rows) % OPTIONS
    vectors = np.zeros((rows, DIMENSION), np.float32)
    vectors[:, :20] = 0.2 * random.standard_normal((rows, 20))
    vectors[np.arange(rows), options] += 1
    return vectors, options


@pytest.mark.parametrize("rows", [40, 120, 2000])
def test_what_lies_off_the_training_rows_is_no_more_familiar(rows: int) -> None:
    vectors, options = drawn(rows)
    fitted, (seen, _) = RelativeMahalanobis.of(vectors, options, OPTIONS), drawn(100, seed=1)
    farther = seen.copy()
    farther[:, 50:] += 0.1 * np.random.default_rng(2).standard_normal((100, DIMENSION - 50))
    before, after = fitted.distance(seen), fitted.distance(farther)
    assert (after >= before - 0.01 * before.std()).all()


@pytest.mark.parametrize("rows", [40, 120, 2000])
def test_the_quadratic_form_is_never_negative(rows: int) -> None:
    fitted = RelativeMahalanobis.of(*drawn(rows), OPTIONS)
    values = np.linalg.eigvalsh(fitted.quadratic.astype(np.float64))
    assert values.min() >= -1e-5 * values.max()


def test_an_option_is_near_its_own_mean() -> None:
    vectors, options = drawn(300)
    fitted = RelativeMahalanobis.of(vectors, options, OPTIONS)
    own = np.array([fitted.distance(vectors[options == option], [option]) for option in range(OPTIONS)])
    other = np.array([fitted.distance(vectors[options == option], [(option + 1) % OPTIONS]) for option in range(3)])
    assert (own < other).mean() > 0.99
