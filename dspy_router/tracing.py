"""What MLflow and OpenTelemetry are told: each decision on its span, and a compile's progress as metrics.

Neither is imported here; what the user has imported is used. Telling them never raises: a failure is logged once.

`mlflow.dspy.autolog()` and `openinference-instrumentation-dspy` open a span for every call of a route, named
`DifferentiableRoute.forward` or `.aforward`; for a `DecisionClient`, MLflow opens `DecisionClient.__call__`, and
openinference one for the predictor in front of it. As with every DSPy module, worker threads (`dspy.Parallel`) do not
inherit the span around them, so there it begins a trace of its own. It gets, for each output field decided:

    dspy_router.<field>.decision       name of the option chosen
    dspy_router.<field>.confidence     its probability
    dspy_router.<field>.propensity     the probability with which it was chosen
    dspy_router.<field>.probabilities  JSON object, option to probability: the 20 likeliest, likeliest first
    dspy_router.<field>.options        how many options there were
    dspy_router.<field>.id             `Decision.id`, by which a reward can name the decision later
    dspy_router.<field>.score          where a guard is set, what it held against its threshold
    dspy_router.<field>.abstained      and whether it declined

A decision without a span of its own (`route.batch`, or a program that only its caller traces) becomes an event
`dspy_router.decision` with these attributes on whatever span is current. OpenTelemetry keeps the last 128 events of a
span unless told otherwise. The input text is not repeated: it is among the span's inputs.

A compile logs to the MLflow run that is active when it starts, such as the one that
`mlflow.dspy.autolog(log_compiles=True)` opens, and to OpenTelemetry's global meter provider:

    dspy_router.rollouts              counter  program runs scored so far, validation included; the step in MLflow
    dspy_router.errors                counter  those that raised
    dspy_router.tokens                counter  tokens their LM calls took
    dspy_router.cost                  counter  their price in dollars, while all prices are known
    dspy_router.score                 gauge    mean reward of the rollouts on the training set so far
    dspy_router.validation_before     gauge    these five as in `FinetuneReport`
    dspy_router.validation_candidate
    dspy_router.validation_after
    dspy_router.train_before
    dspy_router.train_after

The report becomes the run's artifact `dspy_router/report.json`. MLflow patches the optimizers it finds when `autolog`
is called, so import `RouteFinetune` before.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import dspy

from dspy_router.probabilities import likeliest

if TYPE_CHECKING:
    from dspy_router.decisions import Decision

logger = logging.getLogger(__name__)

PREFIX = "dspy_router"
DECISION_EVENT = f"{PREFIX}.decision"
REPORT_ARTIFACT = f"{PREFIX}/report.json"
LIKELIEST = 20  # options whose probabilities a span holds
COUNTERS = ("rollouts", "errors", "tokens", "cost")

_failed: set[str] = set()


def trace_decision(route: Any, decision: "Decision") -> None:
    """Add a decision to the current spans of OpenTelemetry and MLflow, if there are any; see the module."""
    opentelemetry = sys.modules.get("opentelemetry.trace")
    if opentelemetry is None:  # MLflow's spans are OpenTelemetry's
        return
    try:
        span = opentelemetry.get_current_span()
        if span.is_recording():
            if _is_own(span, route):
                span.set_attributes(decision_attributes(decision))
            else:
                span.add_event(DECISION_EVENT, decision_attributes(decision))
        mlflow_span = _mlflow_span()
        # MLflow can be told to share OpenTelemetry's context; its span is then the one above.
        if mlflow_span is not None and mlflow_span.span_id != f"{span.get_span_context().span_id:016x}":
            if _is_own(mlflow_span, route):
                mlflow_span.set_attributes(decision_attributes(decision))
            else:
                event = sys.modules["mlflow.entities"].SpanEvent
                mlflow_span.add_event(event(DECISION_EVENT, attributes=decision_attributes(decision)))
    except Exception:
        warn_once("A decision could not be added to its span.")


def decision_attributes(decision: "Decision") -> dict[str, str | float | int]:
    """A decision as span attributes.

    Example:
        >>> from dspy_router import Decision
        >>> decision = Decision("fruit", "fig", {"date": 0.25, "fig": 0.75}, 0.75, 1.0, "text", id="5f")
        >>> for name, value in decision_attributes(decision).items():
        ...     print(name, value)
        dspy_router.fruit.decision fig
        dspy_router.fruit.confidence 0.75
        dspy_router.fruit.propensity 1.0
        dspy_router.fruit.probabilities {"fig": 0.75, "date": 0.25}
        dspy_router.fruit.options 2
        dspy_router.fruit.id 5f
    """
    shown = likeliest(decision.probabilities, LIKELIEST)
    values: dict[str, str | float | int] = {
        "decision": decision.name,
        "confidence": decision.confidence,
        "propensity": decision.propensity,
        "probabilities": json.dumps({name: round(value, 6) for name, value in shown.items()}, ensure_ascii=False),
        "options": len(decision.probabilities),
        "id": decision.id,
    }
    if decision.score is not None:
        values |= {"score": decision.score, "abstained": decision.abstained}
    return {f"{PREFIX}.{decision.field}.{name}": value for name, value in values.items()}


class MetricsLog(Protocol):
    """Where the metrics of a compile go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics by name; counters are totals so far, `step` is the number of rollouts so far."""

    def finish(self, report: dict[str, Any]) -> None:
        """Take the report of the compile, which is over."""


def metrics_logs() -> list[MetricsLog]:
    """Where the metrics of a compile that begins now, in this thread, should go."""
    logs: list[MetricsLog] = []
    try:
        if (run := getattr(sys.modules.get("mlflow"), "active_run", lambda: None)()) is not None:
            logs.append(MlflowMetrics(run.info.run_id))
        if "opentelemetry.metrics" in sys.modules:
            logs.append(OpenTelemetryMetrics())
    except Exception:
        warn_once("The compile's metrics are not logged.")
    return logs


class MlflowMetrics:
    """An MLflow run. Worker threads log to it, and have no active run of their own, so it is named.

    MLflow sends metrics from a thread of its own, so that no rollout waits for its store.
    """

    def __init__(self, run: str) -> None:
        self._client = sys.modules["mlflow"].MlflowClient()
        self._metric = sys.modules["mlflow.entities"].Metric
        self._run = run
        self._sent: list[Any] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `MetricsLog`."""
        now = time.time_ns() // 1_000_000
        entries = [self._metric(f"{PREFIX}.{name}", value, now, step) for name, value in metrics.items()]
        self._sent.append(self._client.log_batch(self._run, entries, synchronous=False))

    def finish(self, report: dict[str, Any]) -> None:
        """See `MetricsLog`."""
        self._client.log_dict(self._run, report, REPORT_ARTIFACT)
        for operation in self._sent:
            operation.wait()


class OpenTelemetryMetrics:
    """The instruments of OpenTelemetry's meter `dspy_router`."""

    def __init__(self) -> None:
        self._meter = sys.modules["opentelemetry.metrics"].get_meter(PREFIX)
        self._instruments: dict[str, Any] = {}
        self._totals = dict.fromkeys(COUNTERS, 0.0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `MetricsLog`."""
        for name, value in metrics.items():
            if name in COUNTERS:
                self._instrument("create_counter", name).add(value - self._totals[name])
                self._totals[name] = value
            else:
                self._instrument("create_gauge", name).set(value)

    def finish(self, report: dict[str, Any]) -> None:
        """Nothing to add: the report's figures are among the metrics."""

    def _instrument(self, create: str, name: str) -> Any:
        if name not in self._instruments:
            self._instruments[name] = getattr(self._meter, create)(f"{PREFIX}.{name}")
        return self._instruments[name]


def warn_once(message: str) -> None:
    """Log a warning with the exception being handled, the first time only."""
    if message not in _failed:
        _failed.add(message)
        logger.warning("%s This is said once.", message, exc_info=True)


def _mlflow_span() -> Any:
    current = getattr(sys.modules.get("mlflow"), "get_current_active_span", None)
    return None if current is None else current()


def _is_own(span: Any, route: Any) -> bool:
    """Whether a span was opened for the very call being decided: of the route, or of a client and its predictor."""
    caller = (dspy.settings.caller_modules or [None])[-1]
    if caller is not route and not isinstance(caller, dspy.Predict):
        return False
    # `DifferentiableRoute.forward`, `DecisionClient.__call__`, `Predict(Plan).forward`
    return re.split(r"[.(]", getattr(span, "name", ""))[0] in (type(caller).__name__, "DecisionClient")
