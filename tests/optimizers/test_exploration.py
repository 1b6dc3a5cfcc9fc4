from collections import Counter
from collections.abc import Callable

import dspy
import numpy as np

from dspy_router.feedback import Feedback
from dspy_router.optimizers.exploration import Explored, explore
from dspy_router.optimizers.learner import field_rows, fit_routes
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.rollouts import RolloutRunner, keyed
from dspy_router.optimizers.runs import find_routes
from tests.programs import Shop, fruit_requests, right_fruit


def explored(
    budget: int,
    count: int = 30,
    *,
    metric: Callable[..., object] = right_fruit,
    program: dspy.Module | None = None,
    learning: bool = False,
    measure_noise: bool = False,
) -> tuple[Explored, list[int]]:
    """What an exploration found, and how many rows it was asked to fit between rounds."""
    program = program or Shop()
    routes = find_routes(program)
    runner = RolloutRunner(program, routes, metric, num_threads=1, failure_score=0.0, max_errors=5)
    fits: list[int] = []

    def fit(feedback: list[Feedback], reading: RewardReading) -> None:
        fits.append(len(feedback))
        if learning:
            fit_routes(field_rows(routes, feedback, reading))

    found = explore(
        runner, routes, keyed(fruit_requests(count)), budget=budget, reading=RewardReading(),
        measure_noise=measure_noise, seed=0, fit=fit,
    )  # fmt: skip
    return found, fits


def test_an_example_is_left_alone_once_it_succeeded_or_there_is_no_doubt_about_the_option_left() -> None:
    rows = explored(budget=1000)[0].feedback
    assert len({row.example for row in rows}) == 30
    for example in {row.example for row in rows}:
        rewards = [row.reward for row in rows if row.example == example]
        assert rewards in ([1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0, 1.0])


def test_the_option_left_is_tried_where_it_may_be_that_none_is_right() -> None:
    def never_cherry(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        return right_fruit(example, prediction) and prediction.fruit != "cherry"

    rows = explored(budget=1000, count=60, metric=never_cherry)[0].feedback
    rewards: dict[str, list[float | None]] = {}
    for row in rows:
        rewards.setdefault(row.example, []).append(row.reward)
    assert sum(found == [0.0, 0.0, 0.0] for found in rewards.values()) == 20
    assert sum(found[-1] == 1.0 for found in rewards.values()) == 40


def test_no_option_is_tried_twice_on_an_example_of_a_metric_without_noise() -> None:
    rows = explored(budget=1000)[0].feedback
    assert max(Counter((row.example, row.chosen) for row in rows).values()) == 1


def test_the_budget_is_kept_and_heads_are_fitted_between_rounds() -> None:
    found, fits = explored(budget=20)
    assert len(found.feedback) == 20
    assert fits == [8, 16]


def test_a_run_without_a_decision_is_not_repeated() -> None:
    class Silent(Shop):
        def forward(self, request: str) -> dspy.Prediction:
            return dspy.Prediction(fruit="none")

    found, _ = explored(budget=50, count=5, program=Silent())
    assert found.feedback == []


def test_an_option_that_its_description_hides_is_found() -> None:
    class Misled(Shop):
        """Cherry is hidden: to the untrained route it is the least likely option for every request."""

        def __init__(self) -> None:
            super().__init__()
            head = self.clerk.head["fruit"]
            head.bias.data[2] = -5.0

    rows = explored(budget=45, count=45, program=Misled(), learning=True)[0].feedback
    assert any(row.chosen == "cherry" and row.reward == 1.0 for row in rows)


def test_a_noisy_metric_is_measured_and_asked_again() -> None:
    generator = np.random.default_rng(0)

    def noisy(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        return right_fruit(example, prediction) ^ bool(generator.random() < 0.1)

    found, _ = explored(budget=2000, count=300, metric=noisy, learning=True, measure_noise=True)
    assert 0.01 <= found.reading.noise < 0.35
    looks = Counter((row.example, row.chosen) for row in found.feedback)
    assert max(looks.values()) > 1


def test_a_metric_that_never_contradicts_itself_has_no_noise() -> None:
    found, _ = explored(budget=1000, count=200, measure_noise=True)
    assert found.reading.noise == 0.0
    assert Counter(row.run for row in found.feedback).most_common(1)[0][1] == 1
