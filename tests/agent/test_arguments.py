import asyncio
from typing import Literal

import dspy
import pytest

from dspy_router import RoutedAgent, RouteError
from dspy_router.agent import AgentError, Progress
from dspy_router.decisions import choosing
from tests.agent.programs import InOrder, answers, tools_of
from tests.conftest import bag_of_words

QUESTION = "How far is it?"
calls: list[dict[str, object]] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def now() -> str:
    """The time."""
    calls.append({})
    return "noon"


def find(query: str, pages: int = 1) -> str:
    """Find a page."""
    calls.append({"query": query})
    return "a page"


def distance(start: str, end: str) -> int:
    """Kilometres between two towns."""
    calls.append({"start": start, "end": end})
    return 12


def paint(colour: Literal["red", "blue"]) -> str:
    """Paint the wall."""
    calls.append({"colour": colour})
    return "painted"


def agent(*tools: object, **settings: object) -> RoutedAgent:
    return RoutedAgent("question -> answer", tools=list(tools), encoder=bag_of_words, **settings)


def run(program: RoutedAgent, server: object, *names: str) -> dspy.Prediction:
    with dspy.context(lm=server.lm), choosing(InOrder(*names)):
        return program(question=QUESTION)


def test_by_default_a_tool_gets_nothing_the_request_or_what_an_lm_writes() -> None:
    program = agent(now, find, distance, paint)
    assert program.sources == {"now": None, "find": "request", "distance": "lm", "paint": "lm"}
    assert [name for name, _ in program.named_predictors()] == [
        "arguments['distance']", "arguments['paint']", "answer"
    ]  # fmt: skip


def test_cheap_arguments_take_no_lm(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far"))
    run(agent(now, find), server, "now", "find")
    assert calls == [{}, {"query": QUESTION}]
    assert len(server.requests) == 1


def test_a_function_makes_arguments_from_the_run(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far"))

    def between(progress: Progress) -> dict[str, str] | None:
        return {"start": progress.inputs["question"], "end": progress.results[0].text} if progress.results else None

    run(agent(now, distance, args={"distance": between}), server, "now", "distance", "finish")
    assert calls == [{}, {"start": QUESTION, "end": "noon"}]
    assert len(server.requests) == 1


@pytest.mark.parametrize("wait", [False, True])
def test_a_function_that_raises_is_named_in_an_error_with_the_trajectory(scripted_lm: object, wait: bool) -> None:
    server = scripted_lm(answers(answer="far"))

    def between(progress: Progress) -> dict[str, str] | None:
        return {"start": progress.results[1].text} if progress.results else None

    program = agent(now, distance, args={"distance": between})
    message = r"args\['distance'\] raised IndexError.* after 1 results\. .* let it return None"
    with dspy.context(lm=server.lm), choosing(InOrder("now")), pytest.raises(AgentError, match=message) as raised:
        asyncio.run(program.acall(question=QUESTION)) if wait else program(question=QUESTION)
    assert isinstance(raised.value.__cause__, IndexError)
    assert raised.value.trajectory["observation_0"] == "noon"


def test_an_lm_writes_arguments_from_one_tools_schema_and_the_results(scripted_lm: object) -> None:
    server = scripted_lm(
        lambda prompt: answers(answer="far", next_tool_args={"start": "Ostrel", "end": "Vand"})(prompt)
    )
    program = agent(now, find, distance)
    prediction = run(program, server, "now", "distance", "finish")
    assert calls == [{}, {"start": "Ostrel", "end": "Vand"}]
    assert prediction.trajectory["observation_1"] == 12
    assert len(server.requests) == 2
    assert "now(): noon" in server.requests[0]
    instructions = program.arguments["distance"].signature.instructions
    assert "Kilometres between two towns." in instructions
    assert "find" not in instructions


def test_an_lm_that_repeats_a_call_is_not_asked_again_before_something_new(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far", next_tool_args={"start": "Ostrel", "end": "Vand"}))
    chosen = InOrder("distance", "distance", "now", "distance", "finish")
    with dspy.context(lm=server.lm), choosing(chosen):
        agent(now, distance)(question=QUESTION)
    assert [entry for entry in calls if entry] == [{"start": "Ostrel", "end": "Vand"}]
    assert chosen.candidates[2:] == [["now", "finish"], ["distance", "finish"]]


def test_refused_arguments_are_written_once_more_with_the_reason_in_view(scripted_lm: object) -> None:
    replies = iter(["green", "red"])
    server = scripted_lm(
        lambda prompt: answers(
            **({"next_tool_args": {"colour": next(replies)}} if "next_tool_args" in prompt else {"answer": "far"})
        )(prompt)
    )
    prediction = run(agent(paint, now), server, "paint", "finish")
    assert calls == [{"colour": "red"}]
    assert prediction.trajectory["tool_args_0"] == {"colour": "red"}
    assert "paint(colour=\"green\"): Execution error in paint: 'green' is not one of" in server.requests[1]


def test_arguments_refused_twice_are_an_observation(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far", next_tool_args={"colour": "green"}))
    prediction = run(agent(paint, now), server, "paint", "finish")
    assert calls == []
    assert prediction.trajectory["observation_0"].startswith("Execution error in paint: 'green' is not one of")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("written", "told", "asked"),
    [
        ("nonsense", "its arguments could not be read; write one JSON object", 4),  # DSPy asks for JSON each time
        (answers(next_tool_args={"colour": "green"})(""), "'green' is not one of", 2),
    ],
)
def test_a_tool_whose_arguments_fail_is_no_candidate_before_something_new(
    scripted_lm: object, written: str, told: str, asked: int
) -> None:
    server = scripted_lm(lambda prompt: written if "next_tool_args" in prompt else answers(answer="far")(prompt))
    chosen = InOrder("paint", "now", "paint")
    with dspy.context(lm=server.lm), choosing(chosen):
        prediction = agent(paint, now)(question=QUESTION)
    assert tools_of(prediction) == ["paint", "now", "paint", "finish"]
    assert prediction.trajectory["observation_0"].startswith(f"Execution error in paint: {told}")
    assert chosen.candidates == [["paint", "now", "finish"], ["now", "finish"], ["paint", "finish"]]
    assert len(server.requests) == 2 * asked + 1


def test_a_functions_arguments_are_refused_by_the_schema_too(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far"))
    prediction = run(
        agent(paint, now, args={"paint": lambda progress: {"colour": "red", "coat": 2}}), server, "paint", "finish"
    )
    assert "Additional properties are not allowed ('coat'" in prediction.trajectory["observation_0"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"walk": "lm"}, r"\['walk'\], which are no tools"),
        ({"find": "weather"}, "'weather' is no source"),
        ({"distance": "request"}, r"\['start', 'end'\]"),
    ],
)
def test_sources_that_cannot_be_are_refused(args: dict[str, str], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        agent(now, find, distance, args=args)


def test_a_function_that_gives_no_mapping_is_refused(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="far"))
    with pytest.raises(RouteError, match="gave 'red'; expected the arguments by name"):
        run(agent(paint, now, args={"paint": lambda progress: "red"}), server, "finish")
