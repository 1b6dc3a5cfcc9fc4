"""A metric that cannot be called as runs are scored is refused before anything is spent."""

from collections.abc import Callable
from typing import Any

import pytest

from dspy_router import RouteError, RouteFinetune
from tests.programs import Shop, fruit_requests, fruit_route, right_fruit


def of_gepa(gold: Any, pred: Any, trace: Any, pred_name: Any, pred_trace: Any) -> bool:
    return right_fruit(gold, pred)


METRICS: dict[str, Callable[..., Any]] = {
    "two": lambda example, prediction: right_fruit(example, prediction),
    "three": lambda example, prediction, trace: right_fruit(example, prediction),
    "default": right_fruit,
    "of GEPA, with defaults": lambda gold, pred, trace=None, pred_name=None, pred_trace=None: right_fruit(gold, pred),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("taught", [False, True])
def test_a_metric_may_take_the_trace_or_not(metric: Callable[..., Any], taught: bool) -> None:
    optimizer = RouteFinetune(metric=metric, max_metric_calls=90)
    teacher = RouteFinetune().compile(Shop(), trainset=fruit_requests(300, label=True)) if taught else None
    trained = optimizer.compile(Shop(), trainset=fruit_requests(60), teacher=teacher)
    assert optimizer.report is not None
    assert optimizer.report.errors == 0
    assert sum(right_fruit(example, trained(**example.inputs())) for example in fruit_requests(60, seed=1)) > 50


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (of_gepa, r"takes \(gold.*pred_trace.*, but is called as metric\(example, prediction\)"),
        (lambda example: True, r"takes \(example\), but"),
        (0.5, "metric=0.5 cannot be called"),
    ],
)
def test_a_metric_that_no_run_fits_is_refused_at_once(metric: Any, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        RouteFinetune(metric=metric)
    with pytest.raises(RouteError, match=message):
        fruit_route().guard(fruit_requests(300), metric=metric)
