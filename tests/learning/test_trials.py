import numpy as np
import pytest

from dspy_router.learning.trials import next_options, rows_from_trials


def possible(tries: list[tuple[int, float]], options: int = 3) -> list[bool] | None:
    """What is possible after (option, reward) tries of one input, or None if nothing is known."""
    option, reward = (np.array(column) for column in zip(*tries, strict=True))
    rows, known = rows_from_trials(np.zeros(len(tries), int), option, reward, shape=(1, options))
    return rows.possible[0].tolist() if len(known) else None


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([(1, 1.0)], [False, True, False]),
        ([(0, 0.0)], [False, True, True]),
        ([(0, 0.0), (2, 0.0)], [False, True, False]),
        ([(0, 0.0), (2, 1.0)], [False, False, True]),
        ([(0, 1.0), (2, 1.0)], [True, False, True]),
        ([(0, 0.4), (2, 0.7)], [False, True, True]),
        ([(0, 0.4), (1, 0.5), (2, 0.7)], [False, False, True]),
        ([(0, 0.4)], None),
        ([(0, 0.0), (1, 0.0), (2, 0.0)], None),
        ([(0, 0.0), (0, 1.0)], [True, False, False]),
    ],
)
def test_what_tries_leave_possible(tries: list[tuple[int, float]], expected: list[bool] | None) -> None:
    assert possible(tries) == expected


def test_rows_name_the_inputs_they_are_about() -> None:
    rows, known = rows_from_trials(np.array([3, 1]), np.array([0, 1]), np.array([1.0, 0.0]), shape=(5, 2))
    assert known.tolist() == [1, 3]
    assert rows.possible.tolist() == [[True, False], [True, False]]


def test_next_option_is_the_likeliest_untried() -> None:
    policy = np.array([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4], [0.5, 0.3, 0.2]])
    tried = np.array([[True, False, False], [False, False, False], [True, True, True]])
    option, chance = next_options(policy, tried)
    assert option.tolist() == [1, 1, -1]
    np.testing.assert_allclose(chance, [0.75, 0.4, 0.0])


def test_an_option_of_probability_zero_can_still_be_next() -> None:
    option, chance = next_options(np.array([[1.0, 0.0]]), np.array([[True, False]]))
    assert (option.tolist(), chance.tolist()) == ([1], [0.0])
