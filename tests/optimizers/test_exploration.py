from collections import Counter

import dspy

from dspy_router.optimizers.compilation import find_routes
from dspy_router.optimizers.exploration import explore
from dspy_router.optimizers.rollouts import RolloutRunner, keyed
from tests.programs import Shop, fruit_requests, right_fruit


def explored(budget: int, count: int = 30) -> tuple[list, list]:
    """The feedback of an exploration whose heads are never fitted, and the sizes it was asked to fit."""
    program = Shop()
    routes = find_routes(program)
    runner = RolloutRunner(program, routes, right_fruit, num_threads=1, failure_score=0.0, max_errors=5)
    fits: list[int] = []
    rows = explore(
        runner, routes, keyed(fruit_requests(count)), [None] * count, budget=budget, best_reward=1.0, seed=0,
        fit=lambda feedback: fits.append(len(feedback)),
    )  # fmt: skip
    return rows, fits


def test_an_example_is_left_alone_once_it_succeeded() -> None:
    rows, _ = explored(budget=1000)
    for example in {row.example for row in rows}:
        tries = [row for row in rows if row.example == example]
        assert [row.reward for row in tries] == [0.0] * (len(tries) - 1) + [1.0]


def test_no_option_is_tried_twice_on_an_example_and_the_likeliest_goes_first() -> None:
    rows, _ = explored(budget=1000)
    assert max(Counter((row.example, row.chosen) for row in rows).values()) == 1
    route = Shop().clerk
    for row in rows[:30]:
        probabilities = route(request=row.text).probabilities
        tried = [other.chosen for other in rows if other.example == row.example]
        assert tried == sorted(probabilities, key=lambda name: -probabilities[name])[: len(tried)]


def test_the_budget_is_kept_and_heads_are_fitted_between_rounds() -> None:
    rows, fits = explored(budget=20)
    assert len(rows) == 20
    assert fits == [8, 16]


def test_a_run_without_a_decision_is_not_repeated() -> None:
    class Silent(Shop):
        def forward(self, request: str) -> dspy.Prediction:
            return dspy.Prediction(fruit="none")

    program = Silent()
    runner = RolloutRunner(program, find_routes(program), right_fruit, num_threads=1, failure_score=0.0, max_errors=5)
    rows = explore(
        runner, find_routes(program), keyed(fruit_requests(5)), [None] * 5, budget=50, best_reward=1.0, seed=0,
        fit=lambda feedback: None,
    )  # fmt: skip
    assert rows == []
    assert len(runner.finished) == 5
