import ast
import asyncio
import json
import logging
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import dspy
import pytest

from dspy_router import Decision, DecisionClient, DifferentiableRoute, RouteFinetune, record_decisions, tracing
from dspy_router.optimizers.progress import POINTS, Progress
from dspy_router.optimizers.rollouts import Rollout
from dspy_router.tracing import LIKELIEST, decision_attributes, metrics_logs, trace_decision
from tests.conftest import bag_of_words
from tests.programs import (
    AsyncBasket,
    Basket,
    Shop,
    ThreadedBasket,
    fruit_requests,
    fruit_route,
    order_route,
    right_fruit,
)

EVENT = "dspy_router.decision"
FIGURES = ("validation_before", "validation_candidate", "validation_after", "train_before", "train_after")


def ours(attributes: Any) -> dict[str, Any]:
    """What a span or event holds of decisions; MLflow reads JSON text back as what it says."""
    found = {name: value for name, value in (attributes or {}).items() if name.startswith("dspy_router.")}
    return {
        name: json.loads(value) if name.endswith("probabilities") and isinstance(value, str) else value
        for name, value in found.items()
    }


def told(decision: Decision) -> dict[str, Any]:
    return ours(decision_attributes(decision))


def called(program: dspy.Module, **inputs: Any) -> list[Decision]:
    with record_decisions() as decisions:
        program(**inputs)
    return decisions


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """MLflow that traces DSPy into a store of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import mlflow

        before = mlflow.get_tracking_uri(), dspy.settings.track_usage
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("shop", (folder / "artifacts").as_uri()))
        mlflow.dspy.autolog(log_compiles=True)
        yield mlflow
        mlflow.dspy.autolog(disable=True)
        mlflow.set_tracking_uri(before[0])
        dspy.configure(track_usage=before[1])


@pytest.fixture
def mlflow_spans(mlflow: ModuleType, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], list[Any]]:
    """The spans of all traces of the test."""
    mlflow.set_experiment(experiment_id=mlflow.create_experiment(request.node.name, tmp_path.as_uri()))

    def read() -> list[Any]:
        mlflow.flush_trace_async_logging()
        return [span for trace in mlflow.search_traces(return_type="list") for span in trace.data.spans]

    return read


@pytest.fixture(scope="module")
def tracer() -> Any:
    from opentelemetry.sdk.trace import TracerProvider

    return TracerProvider()


@pytest.fixture
def spans(tracer: Any) -> Any:
    """An exporter of OpenTelemetry's spans; nothing but the test opens any."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def instrumented(tracer: Any, spans: Any) -> Iterator[Any]:
    """The same, with DSPy instrumented."""
    from dspy.utils import DummyLM
    from openinference.instrumentation.dspy import DSPyInstrumentor

    # Taking the instrumentation off takes DSPy's own decorators off as well, so the classes are restored by hand.
    patched = [dspy.Module, dspy.Predict, dspy.LM, DummyLM, dspy.Retrieve, dspy.ColBERTv2, dspy.Adapter, dspy.Tool]
    patched += dspy.Predict.__subclasses__()
    before = {owner: dict(vars(owner)) for owner in patched}
    DSPyInstrumentor().instrument(tracer_provider=tracer, skip_dep_check=True)
    yield spans
    DSPyInstrumentor().uninstrument()
    for owner, attributes in before.items():
        for name in set(vars(owner)) - set(attributes):
            delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@pytest.fixture(scope="module")
def meter_reader() -> Iterator[Any]:
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics.set_meter_provider(provider)
    yield reader
    provider.shutdown()


def test_mlflow_shows_a_decision_on_the_routes_own_span(mlflow_spans: Callable[[], list[Any]]) -> None:
    [decision] = called(Shop(), request="a pie please")
    shop, route = mlflow_spans()
    assert (shop.name, route.name) == ("Shop.forward", "DifferentiableRoute.forward")
    assert ours(shop.attributes) == {}
    assert ours(route.attributes) == told(decision) == {
        "dspy_router.fruit.decision": decision.name,
        "dspy_router.fruit.confidence": decision.confidence,
        "dspy_router.fruit.propensity": 1.0,
        "dspy_router.fruit.probabilities": {n: pytest.approx(p, abs=1e-6) for n, p in decision.probabilities.items()},
        "dspy_router.fruit.options": 3,
        "dspy_router.fruit.id": decision.id,
    }  # fmt: skip
    assert "a pie please" not in str(ours(route.attributes))
    assert not shop.events + route.events


@pytest.mark.parametrize("basket", [Basket, ThreadedBasket, AsyncBasket])
def test_every_call_has_a_span_with_its_decision(
    basket: type[Basket], mlflow_spans: Callable[[], list[Any]], instrumented: Any
) -> None:
    decisions = {decision.id: told(decision) for decision in called(basket(), request="pie")}
    assert len(decisions) == 4
    for spans in (mlflow_spans(), instrumented.get_finished_spans()):
        routes = [ours(span.attributes) for span in spans if span.name.startswith("DifferentiableRoute.")]
        assert {attributes["dspy_router.fruit.id"]: attributes for attributes in routes} == decisions
        others = [span for span in spans if not span.name.startswith("DifferentiableRoute.")]
        assert not any(ours(span.attributes) or span.events for span in others)


def test_openinference_shows_all_decisions_of_a_call_on_its_span(instrumented: Any) -> None:
    class Clerk(DifferentiableRoute):
        """A route of one's own."""

    prediction = asyncio.run(Clerk(order_route().signature, encoder=bag_of_words).acall(request="two small pies"))
    [span] = instrumented.get_finished_spans()
    assert span.name == "Clerk.aforward"
    assert ours(span.attributes) == told(prediction.decisions["fruit"]) | told(prediction.decisions["size"])


class Plan(dspy.Signature):
    request: str = dspy.InputField()
    fruit: Literal["apple", "banana"] = dspy.OutputField(desc="the fruit that is asked for")
    urgent: bool = dspy.OutputField(desc="whether it is wanted now")


def test_decisions_of_a_client_are_on_the_span_of_the_client_or_its_predictor(
    mlflow_spans: Callable[[], list[Any]], instrumented: Any
) -> None:
    planner = dspy.Predict(Plan)
    planner.lm = DecisionClient(encoder=bag_of_words)
    fruit, urgent = called(planner, request="an apple now")
    for spans, name in (
        (mlflow_spans(), "DecisionClient.__call__"),
        (instrumented.get_finished_spans(), "Predict(Plan).forward"),
    ):
        assert {span.name: ours(span.attributes) for span in spans} == {
            "Predict.forward": {},
            name: told(fruit) | told(urgent),
        }
        assert not any(span.events for span in spans)


def test_decisions_of_a_batch_are_events_of_the_span_around_them(
    mlflow_spans: Callable[[], list[Any]], instrumented: Any
) -> None:
    class Counter(Shop):
        def forward(self, requests: list[str]) -> dspy.Prediction:
            return dspy.Prediction(found=self.clerk.batch([{"request": request} for request in requests]))

    decisions = called(Counter(), requests=["pie", "stone"])
    for [span] in (mlflow_spans(), instrumented.get_finished_spans()):
        assert span.name == "Counter.forward"
        assert ours(span.attributes) == {}
        assert [event.name for event in span.events] == [EVENT, EVENT]
        assert [ours(event.attributes) for event in span.events] == [told(decision) for decision in decisions]


def test_a_decision_in_a_foreign_span_is_an_event(tracer: Any, spans: Any) -> None:
    with tracer.get_tracer("test").start_as_current_span("GET /shop"):
        decisions = called(Shop(), request="pie") + called(Shop(), request="stone")
    [span] = spans.get_finished_spans()
    assert ours(span.attributes) == {}
    assert [ours(event.attributes) for event in span.events] == [told(decision) for decision in decisions]


def test_a_span_that_mlflow_shares_is_told_once(
    mlflow: ModuleType, mlflow_spans: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", "true")
    with mlflow.start_span("mine"):
        [direct] = called(fruit_route(), request="pie")
        [batched] = fruit_route().batch([{"request": "pie"}])
    mine, route = mlflow_spans()
    assert ours(route.attributes) == told(direct)
    assert [ours(event.attributes) for event in mine.events] == [told(batched.decision)]


def test_of_many_options_the_likeliest_are_told() -> None:
    probabilities = {f"tool{number}": number / 11325 for number in range(151)}
    attributes = told(Decision("tool", "tool7", probabilities, 7 / 11325, 0.5, "text"))
    assert list(attributes["dspy_router.tool.probabilities"]) == [f"tool{150 - rank}" for rank in range(LIKELIEST)]
    assert attributes["dspy_router.tool.options"] == 151


def test_a_span_that_fails_stops_no_decision(caplog: pytest.LogCaptureFixture) -> None:
    from opentelemetry import trace

    class Broken(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            return True

        def add_event(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no space")

    tracing._failed.clear()
    with caplog.at_level(logging.WARNING, "dspy_router"), trace.use_span(Broken(trace.INVALID_SPAN_CONTEXT)):
        assert len(called(Shop(), request="pie") + called(Shop(), request="pie")) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "A decision could not be added to its span. This is said once."
    ]
    assert "no space" in caplog.text


def test_a_decision_that_nothing_traces_costs_a_few_microseconds(mlflow: ModuleType) -> None:
    route, decision = fruit_route(), Decision("fruit", "apple", {"apple": 1.0}, 1.0, 1.0, "text")
    assert min(timeit.repeat(lambda: trace_decision(route, decision), number=200, repeat=100)) / 200 < 5e-6


def test_only_the_importer_of_traces_imports_a_tool_for_tracing() -> None:
    package = Path(tracing.__file__).parent
    importing = {
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.split(".")[0] in ("mlflow", "opentelemetry", "openinference")
    }
    assert importing == {"mlflow_traces.py"}


def histories(mlflow: ModuleType, run: str) -> dict[str, list[tuple[int, float]]]:
    """A run's metrics of ours: name to steps and values."""
    client = mlflow.MlflowClient()
    names = [name for name in client.get_run(run).data.metrics if name.startswith("dspy_router.")]
    return {name[12:]: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in names}


def test_a_compile_logs_its_progress_to_the_run_that_mlflow_opens(mlflow: ModuleType, meter_reader: Any) -> None:
    student, trainset, valset = Shop(), fruit_requests(12), fruit_requests(6, seed=1)
    finetune = RouteFinetune(right_fruit, max_metric_calls=40, num_threads=2)
    trained = finetune.compile(student, trainset=trainset, valset=valset, feedback=[])
    [run, *_] = mlflow.search_runs(output_format="list")
    report, logged = finetune.report, histories(mlflow, run.info.run_id)
    assert run.info.status == "FINISHED"
    assert mlflow.active_run() is None
    last = {name: points[-1][1] for name, points in logged.items()}
    assert last == {
        **{name: getattr(report, name) for name in ("rollouts", "errors", "tokens", "cost")},
        **{name: pytest.approx(getattr(report, name)) for name in FIGURES},
        "score": pytest.approx(sum(row.reward for row in finetune.feedback) / len(finetune.feedback)),
    }  # fmt: skip
    assert logged["rollouts"] == [(step, step) for step in range(1, report.rollouts + 1)]
    assert [step for step, _ in logged["score"]] == list(range(7, report.rollouts - 5))
    assert (logged["validation_before"][0][0], logged["validation_candidate"][0][0]) == (6, report.rollouts)
    artifact = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{tracing.REPORT_ARTIFACT}")
    assert artifact == json.loads(json.dumps(report.to_dict()))
    # MLflow's own bookkeeping works too, and leaves the optimizer as it was.
    artifacts = {found.path for found in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert artifacts >= {"best_model.json", "trainset.json", "valset.json"}
    assert {row.source for row in finetune.feedback} == {"rollout"}
    assert trained(request="pie").fruit == "apple"
    assert metrics_of(meter_reader) == last


def metrics_of(reader: Any) -> dict[str, float]:
    [resource] = reader.get_metrics_data().resource_metrics
    [scope] = [scope for scope in resource.scope_metrics if scope.scope.name == "dspy_router"]
    return {metric.name[12:]: metric.data.data_points[0].value for metric in scope.metrics}


def test_without_a_run_none_is_opened(mlflow: ModuleType) -> None:
    mlflow.dspy.autolog(log_compiles=False)
    before = len(mlflow.search_runs(output_format="list"))
    RouteFinetune(right_fruit, max_metric_calls=6).compile(Shop(), trainset=fruit_requests(6))
    assert len(mlflow.search_runs(output_format="list")) == before
    assert mlflow.active_run() is None


def test_many_rollouts_are_few_points_and_an_unknown_price_none(mlflow: ModuleType) -> None:
    with mlflow.start_run() as run:
        logs = metrics_logs()
    progress = Progress(logs)
    with progress.phase("rollouts", 5000, scored=True) as on_done:
        for number in range(4321):
            on_done(Rollout("example", (), (), number % 2, tokens=3, cost=None))
    for log in logs:
        log.finish({})
    logged = histories(mlflow, run.info.run_id)
    assert set(logged) == {"rollouts", "errors", "tokens", "score"}
    assert [step for step, _ in logged["score"]] == [*range(50, 4321, 50), 4321]
    assert len(logged["score"]) <= POINTS
    assert logged["tokens"][-1] == (4321, 3 * 4321)


def test_a_run_that_cannot_be_logged_to_stops_no_compile(mlflow: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    tracing._failed.clear()
    finetune = RouteFinetune(right_fruit, max_metric_calls=9)
    with mlflow.start_run() as run, caplog.at_level(logging.WARNING, "dspy_router"):
        mlflow.MlflowClient().delete_run(run.info.run_id)
        finetune.compile(Shop(), trainset=fruit_requests(6))
        mlflow.MlflowClient().restore_run(run.info.run_id)
    assert finetune.report is not None
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("dspy_router")]
    assert messages == ["MlflowMetrics: the compile's metrics are no longer logged. This is said once."]
