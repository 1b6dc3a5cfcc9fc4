"""Setting a route's guard: from calibration examples to a threshold with a promise on the program's metric."""

import threading
from collections.abc import Sequence
from typing import Any

import dspy
import numpy as np
from dspy.utils.parallelizer import ParallelExecutor

from dspy_router.deciding import CANDIDATES
from dspy_router.decisions import Decision, recording
from dspy_router.errors import RouteError
from dspy_router.guarding.guard_report import GuardReport
from dspy_router.learning.risk import risk_threshold
from dspy_router.optimizers.rollouts import check_examples, keyed, reward_of
from dspy_router.optimizers.settings import Metric
from dspy_router.optimizers.sources import likely_texts
from dspy_router.route import DifferentiableRoute


def set_guard(
    route: DifferentiableRoute,
    examples: Sequence[dspy.Example],
    *,
    metric: Metric,
    risk: float,
    delta: float,
    program: dspy.Module | None,
    num_threads: int | None,
    seed: int,
) -> GuardReport:
    """What `DifferentiableRoute.guard` does; see there."""
    check_examples(examples, "calibration examples")
    given = {name for example in examples for name in example.inputs()}
    if program is None and (strays := sorted(given - {*route.signature.input_fields, CANDIDATES})):
        raise RouteError(
            f"The examples have the inputs {strays}, but the route takes {list(route.signature.input_fields)}. If they "
            "are those of the program that calls the route, such as a RoutedAgent, give it: guard(..., program=agent)."
        )
    scores, losses = calibration_rows(route, examples, metric, program or route, num_threads)
    if not len(scores):
        raise RouteError(
            f"The route decided nothing in {len(examples)} runs, so there is nothing to promise. Give the program that "
            "calls it: guard(..., program=program)."
        )
    found = risk_threshold(scores, losses, risk=risk, delta=delta, seed=seed)
    names = ", ".join(field.name for field in route.fields)
    report = GuardReport.from_threshold(
        found,
        field=names,
        metric=getattr(metric, "__name__", type(metric).__name__),
        heads=route.learned.digest,
        scores=scores.tolist(),
    )
    route.learned.guard = report
    return report


def calibration_rows(
    route: DifferentiableRoute,
    examples: Sequence[dspy.Example],
    metric: Metric,
    program: dspy.Module,
    num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run a program with the route always deciding: the least score of its decisions in each run, and the loss.

    Runs in which the route decided nothing are left out.

    Returns:
        Scores, float64 [n], and losses, 1 minus the metric, float64 [n].

    Raises:
        RouteError: If the route was trained on a text that is decided, the metric is not in [0, 1], or a run raises.
    """
    route.encoder.encode([text for text in likely_texts(route, keyed(examples)) if text is not None])

    def one(example: dspy.Example) -> tuple[float, float] | None:
        seen = _Seen(route)
        with dspy.context(trace=[]), recording(seen), dspy.settings.context(_route_scoring=True):
            prediction = program(**example.inputs())
            reward = reward_of(metric(example, prediction))
        if not seen.decisions:
            return None
        if not 0 <= reward <= 1:
            raise RouteError(
                f"The metric gave {reward!r} for {dict(example.inputs())!r}: a promise needs a metric in [0, 1]. Scale "
                "it."
            )
        record = route.learned.record
        for decision in seen.decisions:
            if record is not None and record.holds(decision.text):
                raise RouteError(
                    f"The route was trained on {decision.text!r}: what it loses there says nothing of new requests. "
                    "Calibrate on examples that it has not seen; route.trained_on(...) tells which it has."
                )
        return min(decision.score or 0.0 for decision in seen.decisions), 1.0 - reward

    errors: list[Exception] = []

    def unless_failed(example: dspy.Example) -> tuple[float, float] | None:
        try:
            return None if errors else one(example)
        except Exception as error:
            errors.append(error)
            return None

    executor = ParallelExecutor(
        num_threads=num_threads, max_errors=len(examples) + 1, disable_progress_bar=True, timeout=0
    )
    rows = executor.execute(unless_failed, list(examples))
    if errors:
        raise errors[0]
    found = np.array([row for row in rows if row is not None], np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


class _Seen:
    """The decisions of one route, or of copies of it, in a run."""

    def __init__(self, route: DifferentiableRoute) -> None:
        self.decisions: list[Decision] = []
        self._origin = route.learned.origin
        self._lock = threading.Lock()

    def record(self, route: Any, decision: Decision) -> None:
        if route.learned.origin == self._origin:
            with self._lock:
                self.decisions.append(decision)
