"""Feedback from MLflow's traces of the LM planner that a route is to replace."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy
from dspy.adapters.utils import serialize_for_json
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from tqdm.auto import tqdm

from dspy_router.clients.decision_client import named_routes
from dspy_router.costs import call_cost
from dspy_router.decision_types import probabilities_of
from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback, FeedbackTable, feedback_table, text_key
from dspy_router.fields import DecisionField
from dspy_router.logs.late_rewards import as_reward
from dspy_router.route import DifferentiableRoute

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace

PAGE = 100  # traces held in memory at once
JUDGED = {"yes": 1.0, "no": 0.0}  # how MLflow's own judges answer

# What `mlflow.dspy.autolog` writes on the span of a `dspy.Predict` and of an LM call.
SIGNATURE, PREDICT, MODEL = "signature", "LLM", "mlflow.llm.model"


def read_mlflow_traces(
    program: dspy.Module,
    *,
    experiment: str,
    reward: "str | Callable[[Trace], Any] | None",
    predictor: str | None = None,
    filter_string: str | None = None,
    tracking_uri: str | None = None,
) -> FeedbackTable:
    """Read what an LM planner decided, from the traces that `mlflow.dspy.autolog()` left (MLflow 3).

    Every span of a `dspy.Predict` that has a route's inputs and gives the field the route decides becomes a row: the
    text as the route would read it, the planner's choice, and the trace's reward, cost and tokens. The planner's
    propensity is unknown. A reward that was given to the planner's own span speaks of that decision alone; the
    trace's speaks of all its decisions. What cannot be used is passed over and counted by reason.

    Args:
        program: A program with routes in the place of its planners, such as `replace_predictor` makes, or a route.
        experiment: Name of the MLflow experiment.
        reward: Name of the feedback that `mlflow.log_feedback` attached, the latest of that name: a number, a bool,
            or "yes" or "no", as MLflow's judges answer. Or a function from a trace to a reward, None where there is
            none. Traces without a reward are passed over. With `reward=None` all rows come without.
        predictor: The planner's signature as its spans show it, `"question -> tool"`, where spans of other
            predictors would do as well.
        filter_string: Which traces, as `mlflow.search_traces` takes it: `"trace.timestamp_ms > 1767225600000"`.
        tracking_uri: Where the traces are; MLflow's current tracking store by default.

    Raises:
        RouteError: If MLflow is missing, there is no such experiment, the program has no route, or no trace gives
            a row.

    Example:
        With an `Assistant` whose planner has run under `mlflow.dspy.autolog()`::

            routed = replace_predictor(Assistant(), "planner", tools=tools)
            table = read_mlflow_traces(routed, experiment="assistant", reward="user_is_happy")
            print(table)  # rows, and what was passed over
    """
    routes = named_routes(program)
    if not routes:
        raise RouteError(
            f"The program {type(program).__name__} has no DifferentiableRoute, so there is no telling which decisions "
            "to look for. Make one with replace_predictor(program, path)."
        )
    rows: list[Feedback] = []
    skipped: Counter[str] = Counter()
    for trace in _traces(experiment, filter_string, tracking_uri):
        rows += _trace_rows(trace, routes, predictor, reward, skipped)
    return feedback_table(rows, skipped, f"The MLflow experiment {experiment!r}")


def _traces(experiment: str, filter_string: str | None, tracking_uri: str | None) -> "Iterator[Trace]":
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise RouteError("Reading MLflow's traces needs MLflow: pip install 'dspy-router[mlflow]'.") from error
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [entry.name for entry in client.search_experiments(max_results=20)]
        raise RouteError(f"There is no MLflow experiment {experiment!r} at {client.tracking_uri}; there are {names}.")
    token: str | None = None
    with tqdm(desc="reading traces", unit="trace", delay=2) as bar:
        while True:
            page = client.search_traces(
                locations=[found.experiment_id],
                filter_string=filter_string,
                max_results=PAGE,
                order_by=["timestamp_ms ASC"],
                page_token=token,
            )
            for trace in page:
                yield trace
                bar.update()
            token = page.token
            if not token:
                return


@dataclass(frozen=True)
class _Found:
    """A decision that a route could have made: the planner's span, and what the route would have read."""

    span: "Span"
    name: str
    field: DecisionField
    text: str


def _trace_rows(
    trace: "Trace",
    routes: Mapping[str, DifferentiableRoute],
    predictor: str | None,
    reward: "str | Callable[[Trace], Any] | None",
    skipped: Counter[str],
) -> list[Feedback]:
    """The rows of one trace."""
    found = _decisions(trace, routes, predictor, skipped)
    decided = Counter(entry.span.span_id for entry in found)
    rewards = _rewards(trace, reward, set(decided))
    cost, tokens = _usage(trace)
    calls: Counter[tuple[str, str]] = Counter()
    rows = []
    for entry in found:
        span, name, field = entry.span, entry.name, entry.field
        occurrence = calls[name, field.name]
        calls[name, field.name] += 1
        index, probabilities = _option(field, span.outputs[field.output])
        if index is None:
            skipped["choice that is no option of the route"] += 1
            continue
        given = rewards.get(span.span_id, rewards.get(""))
        if given is None and reward is not None:
            skipped["decision without a reward"] += 1
            continue
        number, error = (None, None) if given is None else as_reward(given)
        rows.append(
            Feedback(
                source="log",
                example=text_key(entry.text),
                route=name,
                field=field.name,
                text=entry.text,
                candidates=field.option_names,
                chosen=field.option_names[index],
                propensity=None,
                reward=number,
                occurrence=occurrence,
                sole=len(found) == 1 or (span.span_id in rewards and decided[span.span_id] == 1),
                probabilities=probabilities,
                cost=cost,
                tokens=tokens,
                error=error,
                run=trace.info.trace_id,
                id=f"{trace.info.trace_id}/{span.span_id}/{field.name}",
            )
        )
    return rows


def _decisions(
    trace: "Trace", routes: Mapping[str, DifferentiableRoute], predictor: str | None, skipped: Counter[str]
) -> list[_Found]:
    """The decisions of a trace, in the order they were begun."""
    found = []
    outputs = {field.name for route in routes.values() for field in route.fields}
    spans = [span for span in trace.data.spans if _is_predictor(span, predictor) and outputs & set(span.outputs)]
    if not spans:
        skipped["trace in which no predictor decides the field"] += 1
    for span in sorted(spans, key=lambda span: span.start_time_ns):
        texts = {name: text for name, route in routes.items() if (text := _text(route, span.inputs)) is not None}
        for output in sorted(outputs & set(span.outputs)):
            fitting = [(name, field) for name in texts for field in routes[name].fields if field.name == output]
            exact = [(name, field) for name, field in fitting if set(span.inputs) == _inputs(routes[name])]
            if not fitting:
                skipped["decision without the route's inputs"] += 1
            elif len(exact or fitting) > 1:
                skipped["decision that several routes could have made"] += 1
            else:
                name, field = (exact or fitting)[0]
                found += [_Found(span, name, decided, texts[name]) for decided in field.decision_fields]
    return found


def _is_predictor(span: "Span", signature: str | None) -> bool:
    """Whether a span is a finished call of a `dspy.Predict`, and of the given signature if any."""
    own = span.get_attribute(SIGNATURE)
    finished = isinstance(span.inputs, Mapping) and isinstance(span.outputs, Mapping)
    return span.span_type == PREDICT and own is not None and finished and signature in (None, own)


def _inputs(route: DifferentiableRoute) -> set[str]:
    return set(route.signature.input_fields)


def _text(route: DifferentiableRoute, inputs: Mapping[str, Any]) -> str | None:
    """What the route would have read, of inputs that MLflow wrote as JSON; None if they are not all there."""
    fields = route.signature.input_fields
    values = {name: inputs[name] for name in fields if name in inputs}
    for name, value in values.items():
        declared = _as_declared(fields[name], value)
        # A model or a date is written as DSPy writes it; where only number types differ, the value stays as it is.
        if serialize_for_json(declared) != value:
            values[name] = declared
    try:
        return route.text(values)
    except RouteError:
        return None


def _option(field: DecisionField, value: Any) -> tuple[int | None, dict[str, float] | None]:
    """The index of the option chosen, None if it is none, and the options' probabilities if there are any."""
    if isinstance(value, Mapping):  # a Choice or a Noul
        value = _as_declared(field.info, value)
    index = field.index_of(value)
    if index is None:  # a member of an Enum is written as `Mood.GOOD`
        index = next((index for index, option in enumerate(field.options) if str(option.value) == value), None)
    return index, probabilities_of(value)


def _as_declared(info: FieldInfo, value: Any) -> Any:
    annotation: Any = info.annotation
    try:
        return TypeAdapter(annotation).validate_python(value)
    except (PydanticUserError, ValidationError):
        return value


def _rewards(trace: "Trace", reward: "str | Callable[[Trace], Any] | None", deciding: set[str]) -> dict[str, Any]:
    """The trace's reward, under "", and those of single decisions, under their span's id."""
    if reward is None:
        return {}
    if callable(reward):
        return {} if (given := reward(trace)) is None else {"": given}
    found: dict[str, Any] = {}
    for assessment in sorted(trace.info.assessments, key=lambda assessment: assessment.last_update_time_ms or 0):
        feedback = assessment.feedback
        if assessment.name != reward or feedback is None or assessment.valid is False:
            continue
        value = feedback.value
        if feedback.error is not None:
            value = f"{feedback.error.error_code}: {feedback.error.error_message}"
        elif isinstance(value, str):
            value = JUDGED.get(value.strip().lower(), value)
        if value is not None:
            found[assessment.span_id if assessment.span_id in deciding else ""] = value
    return found


def _usage(trace: "Trace") -> tuple[float | None, int | None]:
    """Dollars and tokens of a trace, as far as they are known."""
    usage, cost = trace.info.token_usage or {}, getattr(trace.info, "cost", None)  # an older MLflow knows none
    tokens = usage.get("total_tokens")
    if cost is not None:
        return cost["total_cost"], tokens
    # DSPy's LM spans carry no usage of their own, so MLflow cannot price them; with one model the total can be priced.
    models = {str(model) for span in trace.data.spans if (model := span.get_attribute(MODEL)) is not None}
    if not usage or len(models) != 1:
        return None, tokens
    return call_cost(models.pop(), usage["input_tokens"], usage["output_tokens"]), tokens
