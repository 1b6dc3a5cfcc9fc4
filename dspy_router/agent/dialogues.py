"""Recorded dialogues between a user and a tool-using agent, in the form of tau-bench, as episodes to learn from."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from dspy_router.agent.imitation import Episode, Step
from dspy_router.agent.progress import READ_BY_ENCODER
from dspy_router.agent.state import StepState
from dspy_router.errors import RouteError

REPLY = "reply"
FAILED = "Error"  # what the result of a call that failed begins with


def read_dialogues(path: str | Path, *, turns: int = 3) -> list[Episode]:
    """Read tau-bench's recorded runs (Yao et al., "tau-bench", 2024) from JSON lines, or from a `.gz` of them.

    A line holds `traj`, the messages in the form of OpenAI's chat API, `task_id`, `trial` and `reward`, as a line of
    the results that tau-bench's own runner writes. The agent's messages are its steps: a call of a tool, or
    `"reply"`. Calls that were made at once count as made one after another.

    Args:
        path: The file.
        turns: How many earlier turns a state holds, at least 1; a `StepEncoder` reads as many.

    Raises:
        RouteError: If `turns` is less than 1, or a line has another form; its number is told.
    """
    if turns < 1:
        raise RouteError(f"turns={turns}: a dialogue's state holds at least one earlier turn.")
    path = Path(path)
    episodes = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                steps = tuple(dialogue_steps(entry["traj"], turns))
                run = f"{entry['task_id']}/{entry['trial']}"
                episodes.append(Episode(str(entry["task_id"]), run, float(entry["reward"]), steps))
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise RouteError(
                    f"Line {number} of {str(path)!r} is no recorded dialogue: {error!r}. Expected an object with traj, "
                    "task_id, trial and reward."
                ) from error
    return episodes


def dialogue_steps(messages: Sequence[Mapping[str, Any]], turns: int = 3) -> Iterator[Step]:
    """The agent's steps in a dialogue, each with the state before it.

    Args:
        messages: With `role`, `content` and the agent's `tool_calls`, as in OpenAI's chat API.
        turns: How many earlier turns a state holds, at least 1.

    Example:
        >>> call = {"id": "1", "function": {"name": "map", "arguments": '{"to": "Ostrel"}'}}
        >>> messages = [
        ...     {"role": "user", "content": "How far is Ostrel?"},
        ...     {"role": "assistant", "tool_calls": [call]},
        ...     {"role": "tool", "tool_call_id": "1", "content": "12 km"},
        ...     {"role": "assistant", "content": "It is 12 km."},
        ... ]
        >>> [(step.state.request, step.state.observation, step.chosen) for step in dialogue_steps(messages)]
        [('How far is Ostrel?', '', 'map'), ('', '12 km', 'reply')]
    """
    state = StepState("")
    for number, message in enumerate(messages):
        if message["role"] == "user":
            state = _later(state, turns, request=message["content"])
        elif message["role"] == "assistant" and (calls := message.get("tool_calls")):
            # An id names a call among those of its message; another message may use it again.
            answers = takewhile(lambda answer: answer["role"] == "tool", islice(messages, number + 1, None))
            results = {answer["tool_call_id"]: answer["content"] or "" for answer in answers}
            for call in calls:
                name, result = call["function"]["name"], results.get(call["id"], "")
                yield Step(state, name)
                state = _later(state, turns, said=f"{name} {call['function']['arguments']}", observation=result)
                state = replace(state, calls=(*state.calls, name), failed=result.startswith(FAILED))
        elif message["role"] == "assistant":
            yield Step(state, REPLY)
            state = _later(state, turns, said=message["content"])


def _later(
    state: StepState, turns: int, *, said: str | None = None, request: str | None = None, observation: str = ""
) -> StepState:
    """The state after the agent said something, or the user did; what was new before is an earlier turn now."""
    earlier = [turn for turn in (*state.messages, state.request, state.observation, _cut(said)) if turn]
    return replace(state, request=_cut(request), observation=_cut(observation), messages=tuple(earlier[-turns:]))


def _cut(text: str | None) -> str:
    return (text or "")[:READ_BY_ENCODER]
