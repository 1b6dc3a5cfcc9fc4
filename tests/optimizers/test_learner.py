from typing import Any

import numpy as np
import pytest

from dspy_router import RouteError, RouteFinetune
from dspy_router.feedback import Feedback, Source
from dspy_router.learning.rows import Objective
from dspy_router.optimizers import learner
from dspy_router.optimizers.learner import FieldRows, field_rows, fit_routes
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.runs import find_routes, open_options, run_evidence, runs_of
from tests.programs import FRUIT, Wrapping, fruit_requests, fruit_route, orders, right_order

ROUTES = {"self": fruit_route()}


def row(source: Source, chosen: str, reward: float | None = 1.0, *, example: str = "1", **more: Any) -> Feedback:
    given = {"route": "self", "field": "fruit", "text": "a pie", "candidates": tuple(FRUIT), "propensity": 1.0, **more}
    return Feedback(source, example=example, chosen=chosen, reward=reward, **given)


def only(rows: list[FieldRows]) -> FieldRows:
    [entry] = rows
    return entry


def targets(*rows: Feedback, noise: float = 0.0) -> list[list[float]]:
    return only(field_rows(ROUTES, rows, RewardReading(noise=noise))).rows.target.round(3).tolist()


def test_a_success_settles_and_a_failure_speaks_for_the_others() -> None:
    assert targets(row("rollout", "banana")) == [[0, 1, 0]]
    right = [row("rollout", "apple", example=f"right {number}") for number in range(30)]
    none_right = 1 / 32
    failed = targets(row("rollout", "banana", 0.0), *right)[0]
    assert failed == pytest.approx([1, none_right, 1], abs=0.01)
    failed = targets(row("log", "banana", 0.0), row("rollout", "apple", 0.0), *right)[0]
    assert failed == pytest.approx([none_right, none_right, 1], abs=0.03)
    [target] = targets(row("rollout", "banana"), noise=0.25)
    assert target[0] == target[2] > 1 / 3
    assert target[1] == 1


def test_without_any_success_nothing_is_concluded() -> None:
    failed = [row("rollout", "banana", 0.0, example=str(number)) for number in range(30)]
    assert field_rows(ROUTES, failed) == []
    [entry] = field_rows(ROUTES, [*failed, row("label", "apple", example="labelled")])
    assert entry.rows.target.tolist() == [[1, 0, 0]]


def test_a_label_overrules_rollouts_logs_and_teacher_in_whatever_order_they_come() -> None:
    rows = [
        row("label", "cherry"), row("rollout", "cherry", 0.0), row("log", "apple", 1.0), row("teacher", "banana"),
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        assert targets(*order) == [[0, 0, 1]]
    assert targets(row("synthetic", "cherry"), row("rollout", "apple")) == [[0, 0, 1]]


def test_a_label_overrules_graded_rollouts() -> None:
    entry = only(
        field_rows(ROUTES, [row("rollout", "apple", 0.7), row("rollout", "banana", 0.1), row("label", "cherry")])
    )
    assert entry.rows.target.tolist() == [[0, 0, 1]]
    assert entry.rows.objective.tolist() == [Objective.LIKELIHOOD]


def test_a_label_overrules_what_was_tried_at_a_later_decision_of_a_run() -> None:
    routes = find_routes(Wrapping())
    size = {"route": "self.packer", "field": "size", "text": "parcel", "candidates": ("small", "large")}
    for rewards in ((0.0, 1.0), (0.1, 0.7)):
        rows = [
            entry
            for number, reward in enumerate(rewards)
            for entry in (
                row("rollout", "apple", reward, route="self.clerk", sole=False, run=str(number)),
                row("rollout", "large", reward, **size, sole=False, run=str(number)),
            )
        ]
        [sizes] = [
            found for found in field_rows(routes, [*rows, row("label", "small", **size)]) if found.field.name == "size"
        ]
        assert sizes.rows.target.tolist() == [[1, 0]]


def test_what_was_tried_overrules_the_teacher_and_other_examples_are_left_alone() -> None:
    taught = row("teacher", "banana", probabilities={"apple": 0.25, "banana": 0.75, "cherry": 0.0})
    assert targets(taught) == [[0.25, 0.75, 0]]
    assert targets(taught, row("rollout", "cherry")) == [[0, 0, 1]]
    assert targets(taught, row("rollout", "cherry", example="2")) == [[0.25, 0.75, 0], [0, 0, 1]]


def test_a_label_and_a_teachers_word_count_as_much_as_their_rows_say() -> None:
    rows = [row("teacher", "banana", weight=0.25), row("label", "apple", example="2", weight=3.0)]
    assert only(field_rows(ROUTES, rows)).rows.weight.tolist() == [0.25, 3.0]


def test_a_teachers_probabilities_of_other_options_do_not_count() -> None:
    soft = {"apple": 0.1, "kiwi": 0.6, "cherry": 0.3}
    assert targets(row("teacher", "apple", probabilities=soft)) == [[0.25, 0, 0.75]]
    assert targets(row("teacher", "apple", probabilities={"kiwi": 1.0})) == [[1, 0, 0]]


def test_outcomes_that_say_nothing_are_no_rows() -> None:
    assert field_rows(ROUTES, [row("rollout", "apple", 1.0), row("rollout", "apple", 0.0)]) == []
    assert field_rows(ROUTES, [row("rollout", "apple", None)]) == []


def test_one_reward_is_for_all_decisions_of_its_run() -> None:
    rows = [
        row("log", "apple", run="r", sole=False), row("log", "banana", run="r", sole=False, example="other text"),
        row("log", "apple", run="s", sole=False), row("log", "cherry", run="r", sole=True), row("log", "cherry"),
    ]  # fmt: skip
    assert [[entry.chosen for entry in run] for run in runs_of(rows)] == [
        ["apple", "banana"],
        ["apple"],
        ["cherry"],
        ["cherry"],
    ]


def test_a_failed_run_counts_a_later_decision_by_how_likely_it_is_reached() -> None:
    routes = find_routes(Wrapping())
    size = {"route": "self.packer", "field": "size", "text": "parcel", "candidates": ("small", "large")}
    pair = {"sole": False, "run": "r"}
    failed = [row("rollout", "apple", 0.0, route="self.clerk", **pair), row("rollout", "large", 0.0, **size, **pair)]
    other = {"example": "2", "sole": False, "run": "s"}
    right = [row("rollout", "apple", route="self.clerk", **other), row("rollout", "large", **size, **other)]
    found = {entry.field.name: entry for entry in field_rows(routes, [*failed, *right])}
    evidence = run_evidence(routes, [*failed, *right], RewardReading())
    none = evidence.none_right(open_options(routes, evidence, [*failed, *right]))
    fruit = routes["self.clerk"].head["fruit"].policy(routes["self.clerk"].encoder.encode(["a pie"]))[0]
    small = routes["self.packer"].head["size"].policy(routes["self.packer"].encoder.encode(["parcel"]))[0][0]
    np.testing.assert_allclose(found["fruit"].rows.target[0], [(1 - none) * small + none, 1, 1], rtol=1e-4)
    np.testing.assert_allclose(found["size"].rows.target[0], [1, 0], atol=1e-4)
    some = (1 - none) * (fruit[0] * small + fruit[1] + fruit[2])
    np.testing.assert_allclose(found["fruit"].rows.weight[0], 1)
    np.testing.assert_allclose(found["size"].rows.weight[0], (1 - none) * fruit[0] * small / (some + none), rtol=1e-4)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_several_decisions_a_run_learn_the_right_ones_from_one_reward(wrong: float) -> None:
    # Decisions drawn evenly; the reward, at times a wrong one, does not say which of the two was to blame.
    random = np.random.default_rng(0)
    program = Wrapping()
    routes = find_routes(program)
    rows = []
    for number, example in enumerate(orders(700, seed=1)):
        fruit, size = FRUIT[random.integers(3)], ("small", "large")[random.integers(2)]
        right = (fruit == example.wanted and size == example.wanted_size) ^ bool(random.random() < wrong)
        shared = {"example": str(number), "run": str(number), "sole": False}
        rows.append(row("rollout", fruit, float(right), route="self.clerk", text=example.request, **shared))
        rows.append(
            row(
                "rollout",
                size,
                float(right),
                route="self.packer",
                field="size",
                text=f"wrapped {example.request}",
                candidates=("small", "large"),
                **shared,
            )
        )
    for _ in range(4):
        fit_routes(field_rows(routes, rows, RewardReading(noise=wrong)))
    test = orders(120, seed=9)
    assert np.mean([right_order(example, program(request=example.request)) for example in test]) > 0.9


def test_each_fields_rows_fit_its_own_head() -> None:
    routes = {"left": fruit_route(), "right": fruit_route()}
    examples = fruit_requests(60, seed=1)
    shifted = dict(zip(FRUIT, FRUIT[1:] + FRUIT[:1], strict=True))
    rows = [
        row("label", chosen, example=str(number), text=example.request, route=name)
        for number, example in enumerate(examples)
        for name, chosen in (("left", example.wanted), ("right", shifted[example.wanted]))
    ]
    fit_routes(field_rows(routes, rows))
    for example in examples[:12]:
        assert routes["left"](request=example.request).fruit == example.wanted
        assert routes["right"](request=example.request).fruit == shifted[example.wanted]


def test_more_options_than_a_fit_has_memory_for_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "MOST_OPTIONS", 2)
    with pytest.raises(RouteError, match=r"'fruit' has 3 options; RouteFinetune trains up to 2.*add_tools"):
        RouteFinetune().compile(fruit_route(), trainset=fruit_requests(6, label=True))
