import dataclasses
import json
import subprocess
import sys

import pytest

from dspy_router.agent.state import StepState

FULL = StepState("How far?", "12 km", ("map", "map", "calculator"), True, ("user: Hello", "assistant: Hi"))


@pytest.mark.parametrize(
    "state",
    [
        StepState(""),
        FULL,
        StepState('{"request": "a request that is JSON"}', "line\nbreak\u2028\x00", ('a "quoted" tool',)),
        StepState("Zürich 東京 🗼", "half of a pair: \ud83d", ("größe",)),
    ],
)
def test_text_holds_the_whole_state(state: StepState) -> None:
    assert StepState.from_text(state.to_text()) == state
    assert "\n" not in state.to_text()


def test_equal_states_have_one_text_and_others_another() -> None:
    assert dataclasses.replace(FULL).to_text() == FULL.to_text()
    changed = [
        dataclasses.replace(FULL, request="How near?"),
        dataclasses.replace(FULL, observation=""),
        dataclasses.replace(FULL, calls=("map", "calculator", "map")),
        dataclasses.replace(FULL, failed=False),
        dataclasses.replace(FULL, messages=()),
    ]
    assert len({state.to_text() for state in [FULL, *changed]}) == 6


def entry(**changes: object) -> str:
    return json.dumps(json.loads(FULL.to_text()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "search: Look it up.",
        "{",
        "{}",
        "[" * 100_000,
        "{" + '"a":{' * 100_000,
        '{"request": "How far?"}',
        entry(unknown=1),
        entry(request=None),
        entry(observation=["12 km"]),
        entry(calls="map"),
        entry(calls=[1]),
        entry(failed=1),
        entry(messages={"user": "Hello"}),
    ],
)
def test_any_other_text_is_no_state(text: str) -> None:
    assert StepState.from_text(text) is None


def test_a_call_replaces_the_observation_and_keeps_the_request() -> None:
    first = StepState("How far?").after("map", "no such place", failed=True)
    assert first == StepState("How far?", "no such place", ("map",), True)
    second = first.after("search", "12 km")
    assert second == StepState("How far?", "12 km", ("map", "search"))
    assert (first.step, second.step) == (1, 2)


@pytest.mark.parametrize(
    ("state", "follows_call"),
    [
        (StepState("How far?"), False),
        (StepState("How far?", "", ("map",)), True),
        (StepState("", "12 km", ("map",), messages=("Hello", "How far?", "map {}")), True),
        (StepState("Thanks!", "", ("map",), messages=("Hello", "How far?", "map {}", "12 km")), False),
    ],
)
def test_a_state_tells_a_tool_s_result_from_a_user_s_turn(state: StepState, follows_call: bool) -> None:
    assert state.follows_call is follows_call


def test_the_module_brings_no_dspy() -> None:
    code = "import sys, dspy_router.agent.state; print('dspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
