"""`RouteFinetune` on routes that decide lists: labels, teachers, logs and the metric."""

from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, TokenEncoder, record_decisions
from dspy_router.evaluation import compare
from dspy_router.feedback import read_feedback, split_feedback
from dspy_router.overrides import explore_decisions
from tests.programs import FRUIT, HINTS, basket_route, baskets, fruit_route, right_basket


def exact(route: Any, count: int = 100) -> float:
    return float(np.mean([right_basket(example, route(request=example.request)) for example in baskets(count, seed=7)]))


def partly_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    """F1, 1 where both are empty."""
    both = len(set(example.wanted) & set(prediction.fruits))
    return 2 * both / (len(example.wanted) + len(prediction.fruits)) if example.wanted or prediction.fruits else 1.0


def test_gold_sets_are_learned_and_counted_option_by_option() -> None:
    route = basket_route()
    assert exact(route) < 0.5
    optimizer = RouteFinetune()
    trained = optimizer.compile(route, trainset=baskets(90, label=True), valset=baskets(30, seed=1, label=True))
    assert exact(trained) > 0.95
    assert optimizer.report.rows == {"label": 270}
    assert optimizer.report.validation_after > optimizer.report.validation_before
    [calibration] = optimizer.report.calibration
    assert (calibration.field, calibration.rows, calibration.biases) == ("fruits", 90, 3)
    assert "calibration of 'fruits'" in str(optimizer.report)


def test_labels_may_be_sets_with_repetitions_empty_or_missing() -> None:
    examples = baskets(90, label=True)
    for number, example in enumerate(examples):
        example.fruits = [tuple, set, list][number % 3]([*example.fruits, *example.fruits])
    examples[0].fruits = None
    optimizer = RouteFinetune()
    assert exact(optimizer.compile(basket_route(), trainset=examples)) > 0.95
    assert optimizer.report.rows == {"label": 267}


def test_a_trainset_of_empty_lists_teaches_to_take_nothing() -> None:
    examples = [dspy.Example(request=f"apple {n}", fruits=[]).with_inputs("request") for n in range(60)]
    assert RouteFinetune().compile(basket_route(), trainset=examples)(request="apple 77").fruits == []


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (["apple", "fig"], r"1 labels are no option: 'fig' \(1\)"),
        ("apple", r"'apple' in place of a list of options \(1\).*options are \['apple', 'banana', 'cherry'\]"),
        ([None], r"None \(1\)"),
        (True, "True in place of a list"),
        ([["apple"]], r"\['apple'\] \(1\)"),
    ],
    ids=["unknown", "no list", "none", "bool", "nested"],
)
def test_labels_that_are_no_lists_of_options_are_named(label: Any, message: str) -> None:
    examples = [*baskets(5, label=True), dspy.Example(request="x", fruits=label).with_inputs("request")]
    with pytest.raises(RouteError, match=message):
        RouteFinetune().compile(basket_route(), trainset=examples)


class Teacher(dspy.Module):
    """Knows the hints; now and then it invents a fruit."""

    def forward(self, request: str) -> dspy.Prediction:
        found = [fruit for fruit in FRUIT if set(HINTS[fruit]) & set(request.split())]
        return dspy.Prediction(fruits=[*found, "fig"] if request.startswith("the") else found)


def test_a_teachers_lists_are_learned_and_inventions_set_aside() -> None:
    optimizer = RouteFinetune()
    examples = baskets(120)
    invented = sum(example.request.startswith("the") for example in examples)
    trained = optimizer.compile(basket_route(), trainset=examples, teacher=Teacher())
    assert exact(trained) > 0.95
    assert invented
    assert optimizer.report.set_aside == {"teacher decisions for no option": 3 * invented}
    again = RouteFinetune()
    assert exact(again.compile(basket_route(), trainset=examples, teacher=trained)) > 0.95
    assert again.report.rows == {"teacher": 360}


def test_the_metric_alone_teaches_lists() -> None:
    optimizer = RouteFinetune(metric=right_basket, max_metric_calls=400)
    trained = optimizer.compile(basket_route(), trainset=baskets(60))
    assert exact(trained) > 0.9
    assert optimizer.report.rollouts <= 400


def test_a_graded_metric_teaches_lists() -> None:
    before = exact(basket_route())
    optimizer = RouteFinetune(metric=partly_right, max_metric_calls=600)
    assert exact(optimizer.compile(basket_route(), trainset=baskets(60))) > before + 0.2


def test_a_log_of_rewarded_options_is_learned_and_compared(tmp_path: Path) -> None:
    route, path = basket_route(), tmp_path / "log.jsonl"
    with explore_decisions(1.0, seed=0):
        for example in baskets(200, seed=2):
            with record_decisions(path, program=route) as run:
                prediction = route(request=example.request)
            for fruit in FRUIT:
                right = (fruit in prediction.fruits) == (fruit in example.wanted)
                run.reward(right, decision=prediction.decisions[f"fruits[{fruit}]"].id)
    learned, judged = split_feedback(read_feedback(path))
    optimizer = RouteFinetune()
    trained = optimizer.compile(route, feedback=learned)
    assert optimizer.report.rows == {"log": len(learned)}
    assert exact(trained) > 0.9
    held_out = [row for row in judged if row.field == "fruits[apple]"]
    comparison = compare(held_out, trained, baseline=route)
    assert comparison.field == "fruits[apple]"


def test_rows_of_a_log_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with record_decisions(path, program=basket_route()) as run:
        basket_route()(request="apple")
        fruit_route()(request="apple")
    run.reward(1.0)
    optimizer = RouteFinetune()
    optimizer.compile(basket_route(), feedback=path)
    assert optimizer.report.set_aside == {"rows of a field that no route decides": 1}


def test_a_list_beside_a_choice_is_learned_from_one_program() -> None:
    class Order(dspy.Signature):
        request: str = dspy.InputField()
        fruits: list[str] = dspy.OutputField()
        urgent: bool = dspy.OutputField()

    route = DifferentiableRoute(Order, tools=FRUIT, encoder=basket_route().encoder)
    examples = baskets(120, label=True)
    for number, example in enumerate(examples):
        example.urgent = number % 2 == 0
        example.request += " hurry" if example.urgent else " slowly"
    trained = RouteFinetune().compile(route, trainset=examples)
    prediction = trained(request="pie stone hurry")
    assert (prediction.fruits, prediction.urgent) == (["apple", "cherry"], True)


def test_a_token_encoder_learns_lists() -> None:
    route = DifferentiableRoute("request -> fruits: list[str]", tools=FRUIT, encoder=TokenEncoder(16))
    optimizer = RouteFinetune()
    optimizer.compile(route, trainset=baskets(100, label=True))
    assert optimizer.report.train_after > optimizer.report.train_before + 0.1


def test_training_again_starts_from_what_was_learned() -> None:
    once = RouteFinetune().compile(basket_route(), trainset=baskets(90, label=True))
    twice = RouteFinetune().compile(once, trainset=baskets(90, seed=4, label=True))
    assert exact(twice) > 0.95
