"""How far a run of an agent has come: its inputs and the results of its tools."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from dspy_router.agent.state import StepState
from dspy_router.agent.tools import FINISH
from dspy_router.encoders.base import encodable
from dspy_router.fields import input_text

READ_BY_ENCODER = 1_000  # characters of an observation that the route gets; the default encoder reads about as many


@dataclass(frozen=True)
class ToolResult:
    """What a call of a tool gave.

    Attributes:
        tool: Its name.
        arguments: What it was called with.
        value: What it returned, whole and as it is; of a call that failed, what went wrong.
        text: The value as LMs read it: a string as it is, anything else as JSON, cut at the agent's limit.
        failed: Whether the tool raised, gave nothing in time, or its schema refused the arguments.
        thought: What the fallback planner said before it chose the call; None if the route chose it.
    """

    tool: str
    arguments: Mapping[str, Any]
    value: Any
    text: str
    failed: bool = False
    thought: str | None = None


@dataclass(frozen=True)
class Progress:
    """A run as it stands, for functions that make arguments from it.

    Attributes:
        inputs: The signature's.
        request: The only input as text, or several as `name: value`, one a line.
        results: The tools' so far, in order.
    """

    inputs: Mapping[str, Any]
    request: str
    results: tuple[ToolResult, ...] = ()

    @classmethod
    def start(cls, signature: type[dspy.Signature], inputs: Mapping[str, Any]) -> "Progress":
        """A run that begins.

        Raises:
            RouteError: If inputs are missing or unknown.
        """
        return cls(inputs, input_text(signature, inputs))

    @property
    def state(self) -> StepState:
        """What the route reads before the next step."""
        state = StepState(self.request)
        for result in self.results:
            state = state.after(result.tool, result.text[:READ_BY_ENCODER], failed=result.failed)
        return state

    def after(self, result: ToolResult) -> "Progress":
        """The run one result later."""
        return replace(self, results=(*self.results, result))

    def has_settled(self, tool: str, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with the same arguments gave a result before, or failed twice.

        Example:
            >>> down = ToolResult("search", {"query": "Ostrel"}, "down", "down", failed=True)
            >>> once = Progress({"question": "Ostrel"}, "Ostrel", (down,))
            >>> once.has_settled("search", {"query": "Ostrel"}), once.after(down).has_settled("search", down.arguments)
            (False, True)
        """
        call = (tool, canonical(arguments))
        same = [result for result in self.results if (result.tool, canonical(result.arguments)) == call]
        return len(same) > 1 or any(not result.failed for result in same)

    def results_text(self) -> str:
        """The results as LMs read them, a line or more each; arguments that only repeat an input are left out.

        Example:
            >>> result = ToolResult("calculator", {"expression": "2 + 2"}, 4, "4")
            >>> Progress({"question": "2 + 2?"}, "2 + 2?", (result,)).results_text()
            'calculator(expression="2 + 2"): 4'
        """
        known = {self.request, *(value for value in self.inputs.values() if isinstance(value, str))}
        lines = []
        for result in self.results:
            given = [
                f"{name}={as_text(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value)}"
                for name, value in result.arguments.items()
                if not isinstance(value, str) or value not in known
            ]
            lines.append(f"{result.tool}({', '.join(given)}): {result.text}")
        return "\n".join(lines) or "No tool was called."

    def trajectory(self, *, finished: bool = False, cut: bool = False) -> dict[str, Any]:
        """The run in the keys of `dspy.ReAct`: `thought_0` (of a planner), `tool_name_0`, `tool_args_0`, ...

        Args:
            finished: Whether the last step was to finish.
            cut: Whether observations are texts for LMs; else they are the tools' values, whole.
        """
        found: dict[str, Any] = {}
        for number, result in enumerate(self.results):
            if result.thought is not None:
                found[f"thought_{number}"] = result.thought
            found[f"tool_name_{number}"] = result.tool
            found[f"tool_args_{number}"] = dict(result.arguments)
            found[f"observation_{number}"] = result.text if cut else result.value
        if finished:
            number = len(self.results)
            found |= {f"tool_name_{number}": FINISH, f"tool_args_{number}": {}, f"observation_{number}": "Completed."}
        return found


def as_text(value: Any, limit: int | None = None) -> str:
    """A value as LMs read it; what is cut off at the limit is told, and what UTF-8 cannot hold is a question mark.

    Example:
        >>> as_text({"price": 3}), as_text("abcdef", 3)
        ('{"price": 3}', 'abc [cut: 3 of 6 characters]')
    """
    plain = serialize_for_json(value)
    text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]} [cut: {limit} of {len(text)} characters]"
    return encodable(text)  # half a surrogate pair can be sent to no LM


def canonical(arguments: Mapping[str, Any]) -> str:
    """Arguments as a text that is the same for equal ones."""
    return json.dumps(serialize_for_json(dict(arguments)), sort_keys=True, default=repr)
