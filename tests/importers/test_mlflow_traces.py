import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, replace_predictor
from dspy_router.costs import call_cost
from dspy_router.feedback import FeedbackTable, read_feedback, write_feedback
from dspy_router.importers import mlflow_traces, read_mlflow_traces
from tests.conftest import ScriptedServer, bag_of_words
from tests.importers.traced_planners import VISIT, WEIGHTS, Drafted, Planned, PlannedTwice, Typed

ROOT = Path(__file__).parents[2]
TOOLS = ["apple", "banana"]


def answer(prompt: str) -> str:
    request = prompt.split("[[ ## request ## ]]")[-1].split("Respond with")[0]
    fruit = next((fruit for fruit in ("apple", "banana", "durian") if fruit in request), "apple")
    said = {"reasoning": "hm", "fruit": fruit, "doubt": "none", "answer": "here", "mood": "bad", "urgent": "True"}
    return "\n\n".join([f"[[ ## {name} ## ]]\n{value}" for name, value in said.items()] + ["[[ ## completed ## ]]"])


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield


@pytest.fixture(scope="module")
def store(offline: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store with the traces of `traced_planners`."""
    folder = tmp_path_factory.mktemp("mlflow")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    server = ScriptedServer(answer)
    arguments = [server.lm.kwargs["api_base"], store, (folder / "artifacts").as_uri()]
    try:
        subprocess.run(
            [sys.executable, "-m", "tests.importers.traced_planners", *arguments],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
    finally:
        server.close()
    return store


def routed(program: dspy.Module) -> dspy.Module:
    listed = isinstance(program, PlannedTwice)  # its signature lists the options itself
    return replace_predictor(program, "planner", None if listed else TOOLS, encoder=bag_of_words)


@pytest.fixture
def read(store: str) -> Callable[..., FeedbackTable]:
    return lambda program, experiment, **settings: read_mlflow_traces(
        program, experiment=experiment, tracking_uri=store, **({"reward": "good"} | settings)
    )


def test_a_planners_traces_become_rows(read: Callable[..., FeedbackTable], tmp_path: Path) -> None:
    table = read(routed(Planned()), "planned")
    assert [(row.text, row.chosen, row.reward, row.error) for row in table.rows] == [
        ("apple one", "apple", 1.0, None),
        ("banana two", "banana", 0.25, None),
        ("banana five", "banana", 0.0, None),
        ("apple six", "apple", None, "reward is 'ValueError: no metric'"),
    ]
    assert table.skipped == {
        "decision without a reward": 1,
        "choice that is no option of the route": 1,
        "trace in which no predictor decides the field": 1,
        "decision without the route's inputs": 1,
    }
    for row in table.rows:
        assert (row.source, row.route, row.field, row.candidates) == (
            "log",
            "self.planner",
            "fruit",
            ("apple", "banana"),
        )
        assert (row.propensity, row.sole, row.tokens) == (None, True, 25)
        assert row.cost == call_cost("gpt-4o-mini", 20, 5) > 0
    assert len({row.run for row in table.rows}) == len({row.id for row in table.rows}) == len(table.rows)
    write_feedback(table.rows, tmp_path / "rows.jsonl")
    assert read_feedback(tmp_path / "rows.jsonl") == list(table.rows)


def test_several_decisions_of_a_trace_share_its_reward_unless_one_has_its_own(
    read: Callable[..., FeedbackTable],
) -> None:
    table = read(routed(PlannedTwice()), "planned twice")
    assert [(row.text, row.occurrence, row.reward, row.sole) for row in table.rows] == [
        ('request: apple\nhints: ["ripe"]', 0, 1.0, False),
        ("request: apple\nhints: []", 1, 0.5, True),
    ]
    assert len({row.run for row in table.rows}) == 1


def test_spans_of_one_predictor_are_told_by_its_signature(read: Callable[..., FeedbackTable]) -> None:
    program = routed(Drafted())
    assert [row.sole for row in read(program, "drafted").rows] == [False, False]
    (row,) = read(program, "drafted", predictor="request -> fruit").rows
    assert row.sole
    with pytest.raises(
        RouteError, match=r"no usable feedback row: trace in which no predictor decides the field \(1\)"
    ):
        read(program, "drafted", predictor="request -> fruit, sureness")


def test_decisions_that_several_routes_could_have_made_are_not_guessed(read: Callable[..., FeedbackTable]) -> None:
    class Two(dspy.Module):
        def __init__(self, second: str) -> None:
            super().__init__()
            self.first = DifferentiableRoute("request -> fruit", tools=TOOLS, encoder=bag_of_words)
            self.second = DifferentiableRoute(second, tools=TOOLS, encoder=bag_of_words)

    with pytest.raises(RouteError, match=r"decision that several routes could have made \(6\)"):
        read(Two("request -> fruit"), "planned")
    other = read(Two("question -> fruit"), "planned")
    assert [row.route for row in other.rows] == ["self.first"] * 4 + ["self.second"]
    optional = read(Two("request, hints: list[str] | None -> fruit"), "planned")
    assert [row.route for row in optional.rows] == ["self.first"] * 4


def test_typed_inputs_and_choices_are_read_as_the_route_reads_them(read: Callable[..., FeedbackTable]) -> None:
    route = DifferentiableRoute(Typed, encoder=bag_of_words)
    rows = read(route, "typed").rows
    assert {(row.route, row.field, row.chosen, row.sole) for row in rows} == {
        ("self", "mood", "bad", False),
        ("self", "urgent", "True", False),
    }
    live = route(visit=VISIT, weights=WEIGHTS).decisions["mood"].text
    assert [row.text for row in rows] == [live, live]


def test_traces_are_read_page_by_page(read: Callable[..., FeedbackTable], monkeypatch: pytest.MonkeyPatch) -> None:
    program = routed(Planned())
    whole = read(program, "planned")
    monkeypatch.setattr(mlflow_traces, "PAGE", 3)
    assert read(program, "planned") == whole


def test_a_reward_may_be_a_function_of_the_trace_or_left_out(read: Callable[..., FeedbackTable]) -> None:
    program = routed(Planned())
    by_time = read(program, "planned", reward=lambda trace: trace.info.execution_duration / 1e3)
    assert len(by_time.rows) == 5
    assert all(row.has_reward for row in by_time.rows)
    unrewarded = read(program, "planned", reward=None)
    assert [row.reward for row in unrewarded.rows] == [None] * 5
    none = read(program, "planned", reward=None, filter_string="trace.timestamp_ms > 0").rows
    assert none == unrewarded.rows
    with pytest.raises(RouteError, match=r"no usable feedback row: .*decision without a reward \(5\)"):
        read(program, "planned", reward="other")


def test_what_is_not_there_is_named(read: Callable[..., FeedbackTable]) -> None:
    program = routed(Planned())
    with pytest.raises(RouteError, match=r"no MLflow experiment 'shop' at sqlite:.*'planned twice'"):
        read(program, "shop")
    with pytest.raises(RouteError, match="'empty' holds no usable feedback row: it is empty"):
        read(program, "empty")
    with pytest.raises(RouteError, match="Planned has no DifferentiableRoute"):
        read(Planned(), "planned")


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RouteError, match=r"pip install 'dspy-router\[mlflow\]'"):
        read_mlflow_traces(routed(Planned()), experiment="planned", reward=None)


def test_reading_leaves_mlflow_and_dspy_as_they_were(read: Callable[..., FeedbackTable]) -> None:
    import mlflow

    before = (mlflow.get_tracking_uri(), list(dspy.settings.callbacks), dspy.settings.track_usage)
    read(routed(Planned()), "planned")
    assert (mlflow.get_tracking_uri(), list(dspy.settings.callbacks), dspy.settings.track_usage) == before


def test_importing_the_importers_does_not_import_mlflow() -> None:
    code = (
        "import sys; from dspy_router.importers import read_mlflow_traces, read_table; print('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
