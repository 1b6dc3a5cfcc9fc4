"""Setting a route's guard: from calibration examples to a threshold with a promise on the program's metric."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import dspy
import numpy as np
from dspy.utils.parallelizer import ParallelExecutor

from dspy_router.deciding import CANDIDATES
from dspy_router.decisions import Decision, recording
from dspy_router.encoders.base import shortened
from dspy_router.errors import RouteError
from dspy_router.guarding.guard_report import GuardReport
from dspy_router.learning.risk import risk_threshold
from dspy_router.optimizers.rollouts import check_examples, keyed, reward_of
from dspy_router.optimizers.settings import Metric, check_metric, verdict
from dspy_router.optimizers.sources import likely_texts
from dspy_router.route import DifferentiableRoute
from dspy_router.training_record import text_keys

logger = logging.getLogger(__name__)


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
    check_metric(metric)
    check_examples(examples, "calibration examples")
    given = {name for example in examples for name in example.inputs()}
    if program is None and (strays := sorted(given - {*route.signature.input_fields, CANDIDATES})):
        raise RouteError(
            f"The examples have the inputs {strays}, but the route takes {list(route.signature.input_fields)}. If they "
            "are those of the program that calls the route, such as a RoutedAgent, give it: guard(..., program=agent)."
        )
    scores, losses, texts = calibration_rows(route, examples, metric, program or route, num_threads)
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
        fallback=route.fallback is not None,
        texts=texts,
        scores=scores.tolist(),
    )
    if report.repetition:
        logger.warning("The promise about %s assumes: %s", names, report.repetition)
    route.learned.guard = report
    return report


def calibration_rows(
    route: DifferentiableRoute,
    examples: Sequence[dspy.Example],
    metric: Metric,
    program: dspy.Module,
    num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Run a program with the route always deciding: the least score of its decisions in each run, and the loss.

    Runs in which the route decided nothing are left out.

    Returns:
        Scores, float64 [n], losses, 1 minus the metric, float64 [n], and how many of the n runs differ in what the
        route read.

    Raises:
        RouteError: If the route was trained on texts that are decided, the metric is not in [0, 1] or cannot judge
            what the route itself predicts, or a run raises.
    """
    record = route.learned.record
    trained: list[str] = []
    route.encoder.encode([text for text in likely_texts(route, keyed(examples)) if text is not None])

    def one(example: dspy.Example) -> tuple[float, float, frozenset[bytes]] | None:
        seen = _Seen(route)
        with dspy.context(trace=[]), recording(seen), dspy.settings.context(_route_scoring=True):
            prediction = program(**example.inputs())
            texts = [decision.text for decision in seen.decisions]
            if record is not None:
                trained.extend([text for text in texts if record.holds(text)][:1])
            if trained:  # the runs that are left only tell which others were
                return None
            reward = reward_of(_judged(metric, example, prediction, program is route))
        if not seen.decisions:
            return None
        if not 0 <= reward <= 1:
            raise RouteError(
                f"The metric gave {reward!r} for {dict(example.inputs())!r}: a promise needs a metric in [0, 1]. Scale "
                "it."
            )
        return min(decision.score or 0.0 for decision in seen.decisions), 1.0 - reward, text_keys(texts)

    errors: list[Exception] = []

    def unless_failed(example: dspy.Example) -> tuple[float, float, frozenset[bytes]] | None:
        try:
            if not errors:
                return one(example)
        except RouteError as error:
            errors.append(error)
        except Exception as error:
            failed = RouteError(
                f"The calibration run of {shortened(str(dict(example.inputs())))} raised {error!r}. If that is a run's "
                "own failure, let the metric or the program turn it into a reward of 0; then guard again."
            )
            failed.__cause__ = error
            errors.append(failed)
        return None

    executor = ParallelExecutor(
        num_threads=num_threads, max_errors=len(examples) + 1, disable_progress_bar=True, timeout=0
    )
    rows = [row for row in executor.execute(unless_failed, list(examples)) if row is not None]
    if errors:
        raise errors[0]
    if trained:
        some = ", ".join(repr(shortened(text)) for text in sorted(set(trained))[:3])
        raise RouteError(
            f"The route was trained on {len(trained):,} of the {len(examples):,} calibration examples, such as {some}: "
            "what it loses there says nothing of new requests. Calibrate on examples that it has not seen, drawn as "
            "future requests will be; route.trained_on(...) tells which it has. Without those it has seen, the promise "
            "is about requests that were not in training."
        )
    scores, losses = (np.array([row[place] for row in rows], np.float64) for place in (0, 1))
    return scores, losses, len({texts for _, _, texts in rows})


def _judged(metric: Metric, example: dspy.Example, prediction: Any, of_route: bool) -> Any:
    try:
        return verdict(metric, example, prediction)
    except (AttributeError, KeyError) as error:
        if not of_route:
            raise
        raise RouteError(
            f"The metric failed on the route's own prediction, whose fields are {list(prediction.keys())}: {error!r}. "
            "If it judges the answer of the program that calls the route, give that: guard(..., program=program)."
        ) from error


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
