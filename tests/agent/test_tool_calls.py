import asyncio
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dspy
import pytest
from langchain_core.tools import tool as langchain_tool
from mcp import Client, StdioServerParameters

from dspy_router import RoutedAgent, RouteError, record_decisions
from dspy_router.agent import StepState
from dspy_router.agent.tools import schema, sole_argument
from dspy_router.decisions import choosing
from tests.agent.programs import InOrder, answers, search, tools_of
from tests.conftest import bag_of_words

KITCHEN = StdioServerParameters(
    command=sys.executable, args=[str(Path(__file__).parents[1] / "mcp_tool_server.py")]
)  # fmt: skip
ANSWER = answers(answer="done")


def agent(*tools: object, **settings: object) -> RoutedAgent:
    return RoutedAgent("question -> answer", tools=list(tools), encoder=bag_of_words, **settings)


def called(program: RoutedAgent, server: object, *, wait: bool = False) -> dspy.Prediction:
    """A run that calls the program's first tool and finishes."""
    name = next(iter(program.tools))
    with dspy.context(lm=server.lm), choosing(InOrder(name, "finish")):
        if wait:
            return asyncio.run(program.acall(question="Ostrel?"))
        return program(question="Ostrel?")


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("raised", [KeyError("attic"), StopIteration("end"), RouteError("inner")])
def test_what_a_tool_raises_is_an_observation(scripted_lm: object, wait: bool, raised: Exception) -> None:
    def attic() -> str:
        """Look into the attic."""
        raise raised

    server = scripted_lm(ANSWER)
    with record_decisions() as decisions:
        prediction = called(agent(attic, search), server, wait=wait)
    assert prediction.trajectory["observation_0"].startswith("Execution error in attic: ")
    assert str(raised) in prediction.trajectory["observation_0"]
    state = StepState.from_text(decisions[1].text)
    assert state is not None
    assert state.failed
    assert "Execution error in attic" in server.requests[0]


def test_a_call_that_failed_may_be_made_once_more(scripted_lm: object) -> None:
    def unsteady(query: str) -> str:
        """Ask a server that is often down."""
        raise ConnectionError("down")

    chosen = InOrder("unsteady", "unsteady", "search")
    with dspy.context(lm=scripted_lm(ANSWER).lm), choosing(chosen):
        prediction = agent(unsteady, search)(question="Ostrel?")
    assert chosen.candidates == [*[["unsteady", "search", "finish"]] * 2, ["search", "finish"]]
    assert tools_of(prediction) == ["unsteady", "unsteady", "search", "finish"]


@pytest.mark.parametrize("wait", [False, True])
def test_a_tool_that_hangs_is_left_alone_after_its_time(scripted_lm: object, wait: bool) -> None:
    over = threading.Event()

    def hang() -> str:
        """Wait for ever."""
        over.wait(20)
        return "at last"

    server = scripted_lm(ANSWER)
    started = time.perf_counter()
    prediction = called(agent(hang, search, timeout={"hang": 0.05}), server, wait=wait)
    over.set()
    assert time.perf_counter() - started < 10
    assert "hang gave no result within 0.05 seconds" in prediction.trajectory["observation_0"]


def test_a_coroutine_that_hangs_is_cancelled(scripted_lm: object) -> None:
    cancelled = []

    async def hang() -> str:
        """Wait for ever."""
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "at last"

    prediction = called(agent(hang, search, timeout=0.05), scripted_lm(ANSWER), wait=True)
    assert cancelled == [True]
    assert "no result within" in prediction.trajectory["observation_0"]


@pytest.mark.parametrize(("wait", "timeout"), [(False, None), (False, 5.0), (True, None), (True, 5.0)])
def test_a_tool_runs_in_the_callers_dspy_settings(scripted_lm: object, wait: bool, timeout: float | None) -> None:
    def mark() -> str:
        """Read a setting."""
        return str(dspy.settings.get("mark", "none"))

    with dspy.context(mark="seen"):
        prediction = called(agent(mark, search, timeout=timeout), scripted_lm(ANSWER), wait=wait)
    assert prediction.trajectory["observation_0"] == "seen"


def test_the_event_loop_is_free_while_a_tool_runs(scripted_lm: object) -> None:
    ready = threading.Event()

    def wait_for_loop() -> str:
        """Wait for the other task."""
        return "free" if ready.wait(10) else "blocked"

    async def both(program: RoutedAgent) -> dspy.Prediction:
        run = asyncio.ensure_future(program.acall(question="Ostrel?"))
        await asyncio.sleep(0.05)
        ready.set()
        return await run

    server = scripted_lm(ANSWER)
    with dspy.context(lm=server.lm), choosing(InOrder("wait_for_loop", "finish")):
        prediction = asyncio.run(both(agent(wait_for_loop, search)))
    assert prediction.trajectory["observation_0"] == "free"


def test_a_huge_result_is_cut_for_the_lm_and_whole_in_the_trajectory(scripted_lm: object) -> None:
    def dump() -> str:
        """Everything there is."""
        return "x" * 10_000_000

    server = scripted_lm(ANSWER)
    with record_decisions() as decisions:
        prediction = called(agent(dump, search, result_limit=500), server)
    assert len(prediction.trajectory["observation_0"]) == 10_000_000
    assert "[cut: 500 of 10000000 characters]" in server.requests[0]
    assert len(server.requests[0]) < 2_000
    assert len(decisions[1].text) < 2_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"price": 3}, '{"price": 3}'),
        (None, "null"),
        ([1, 2], "[1, 2]"),
        (2.5, "2.5"),
        ({1}, "[1]"),
        ("half an emoji: \ud83d", "half an emoji: ?"),
        (b"\xff", str(b"\xff")),
    ],
)
def test_what_is_no_string_is_read_as_json(scripted_lm: object, value: object, text: str) -> None:
    def give() -> object:
        """Something."""
        return value

    server = scripted_lm(ANSWER)
    assert called(agent(give, search), server).trajectory["observation_0"] == value
    assert f"give(): {text}\n" in server.requests[0]


def test_asynchronous_tools_are_awaited_or_waited_for_where_dspy_may(scripted_lm: object) -> None:
    async def fetch(page: str) -> str:
        """Fetch a page."""
        await asyncio.sleep(0)
        return f"page {page}"

    server = scripted_lm(ANSWER)
    assert called(agent(fetch, search), server, wait=True).trajectory["observation_0"] == "page Ostrel?"
    with dspy.context(allow_tool_async_sync_conversion=True):
        assert called(agent(fetch, search), server).trajectory["observation_0"] == "page Ostrel?"
    with pytest.raises(RouteError, match=r"\['fetch'\] are asynchronous"):
        called(agent(fetch, search), server)


def test_a_function_that_gives_a_coroutine_is_awaited(scripted_lm: object) -> None:
    async def fetch() -> str:
        await asyncio.sleep(0)
        return "a page"

    program = agent(dspy.Tool(lambda: fetch(), name="fetch", desc="Fetch a page."), search)
    assert called(program, scripted_lm(ANSWER), wait=True).trajectory["observation_0"] == "a page"


def test_tools_of_an_mcp_server_are_called(scripted_lm: object) -> None:
    server = scripted_lm(ANSWER)

    async def run() -> dspy.Prediction:
        async with Client(KITCHEN) as client:
            listed = (await client.list_tools()).tools
            tools = [dspy.Tool.from_mcp_tool(client, tool) for tool in listed]
            program = agent(*tools, args={"set_timer": lambda progress: {"minutes": 7}})
            assert sole_argument(program.tools["set_timer"]) == "minutes"
            assert schema(program.tools["convert_units"])["required"] == ["amount", "unit"]
            return await program.acall(question="Ring in 7 minutes")

    with dspy.context(lm=server.lm), choosing(InOrder("set_timer", "finish")):
        prediction = asyncio.run(asyncio.wait_for(run(), 30))
    assert prediction.trajectory["observation_0"] == "timer: 7 min"


def test_a_langchain_tool_is_converted_by_dspy() -> None:
    @langchain_tool
    def weigh(thing: str, exact: bool = False) -> str:
        """Weigh a thing."""
        return "1 kg"

    assert sole_argument(dspy.Tool.from_langchain(weigh)) == "thing"
    with pytest.raises(RouteError, match="from_langchain"):
        agent(weigh)


def test_what_a_function_takes_besides_is_no_argument() -> None:
    def log(message: str, *rest: str, level: int = 1, **more: str) -> str:
        """Note something."""
        return message

    assert sole_argument(dspy.Tool(log)) == "message"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "tools is empty"),
        ([search, search], "two options named 'search'"),
        ([search, dspy.Tool(search, name="finish")], "named 'finish'"),
        (["search"], "'search' is no tool that an agent can call"),
        ([search, lambda query: query], "has no name of its own"),
        ([partial(search, query="Ostrel")], "has no name of its own"),
    ],
)
def test_unusable_tools_are_refused(tools: list[Callable[..., str]], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        agent(*tools)


@pytest.mark.parametrize("timeout", [0, {"search": -1}, {"walk": 3}])
def test_unusable_timeouts_are_refused(timeout: object) -> None:
    with pytest.raises(RouteError, match="timeout"):
        agent(search, timeout=timeout)
