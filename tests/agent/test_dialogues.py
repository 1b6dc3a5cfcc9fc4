import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dspy_router import RouteError
from dspy_router.agent.dialogues import dialogue_steps, read_dialogues
from dspy_router.agent.progress import READ_BY_ENCODER
from dspy_router.agent.state import StepState

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(*tools: str) -> Message:
    calls = [{"id": str(number), "function": {"name": tool, "arguments": "{}"}} for number, tool in enumerate(tools)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(text: str | None, number: int = 0) -> Message:
    return {"role": "tool", "tool_call_id": str(number), "content": text}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    user("How far is Ostrel?"),
    call("map"),
    result("Error: no such place"),
    call("think"),
    result(None),
    reply("Where is it?"),
    user("In Vell."),
    call("map"),
    result("12 km"),
    reply("It is 12 km."),
]


def test_a_state_holds_what_was_new_the_calls_and_the_last_turns() -> None:
    steps = list(dialogue_steps(MESSAGES, turns=2))
    assert [step.chosen for step in steps] == ["map", "think", "reply", "map", "reply"]
    assert [step.state for step in steps] == [
        StepState("How far is Ostrel?"),
        StepState("", "Error: no such place", ("map",), True, ("How far is Ostrel?", "map {}")),
        StepState("", "", ("map", "think"), False, ("Error: no such place", "think {}")),
        StepState("In Vell.", "", ("map", "think"), False, ("think {}", "Where is it?")),
        StepState("", "12 km", ("map", "think", "map"), False, ("In Vell.", "map {}")),
    ]
    assert [step.state.follows_call for step in steps] == [False, True, True, False, True]


def test_a_state_knows_nothing_of_what_comes_after_it() -> None:
    whole = list(dialogue_steps(MESSAGES))
    for number in range(len(MESSAGES)):
        known = list(dialogue_steps(MESSAGES[:number]))
        assert [step.state for step in known] == [step.state for step in whole[: len(known)]]


def test_calls_made_at_once_count_as_one_after_another() -> None:
    messages = [user("How far?"), call("map", "search"), result("a book", 1), result("12 km", 0), reply("12 km.")]
    states = [step.state for step in dialogue_steps(messages)]
    assert [(state.observation, state.calls) for state in states] == [
        ("", ()),
        ("12 km", ("map",)),
        ("a book", ("map", "search")),
    ]


def test_long_turns_are_cut() -> None:
    messages = [
        user("far? " * 1000),
        call("map"),
        result("km " * 1000),
        reply("so " * 1000),
        user("Yes."),
        reply("Ok."),
    ]
    for step in dialogue_steps(messages):
        assert max(map(len, (step.state.request, step.state.observation, *step.state.messages))) <= READ_BY_ENCODER


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz"])
def test_episodes_are_read_from_lines(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = [json.dumps({"task_id": 3, "trial": trial, "reward": 1.0, "traj": MESSAGES}) for trial in (0, 1)]
    with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as file:
        file.write("\n".join(lines))
    episodes = read_dialogues(path)
    assert [(episode.task, episode.run, episode.reward) for episode in episodes] == [
        ("3", "3/0", 1.0),
        ("3", "3/1", 1.0),
    ]
    assert episodes[0].steps == tuple(dialogue_steps(MESSAGES))


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"task_id": 3, "trial": 0, "reward": null, "traj": []}',
     '{"task_id": 3, "trial": 0, "reward": 1, "traj": [{"role": "assistant"}]}'],
)  # fmt: skip
def test_a_line_of_another_form_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"task_id": 3, "trial": 0, "reward": 1, "traj": MESSAGES}) + f"\n{line}\n")
    with pytest.raises(RouteError, match=r"Line 2 of .* is no recorded dialogue"):
        read_dialogues(path)


def test_a_state_without_earlier_turns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouteError, match="turns=0"):
        read_dialogues(tmp_path / "runs.jsonl", turns=0)
