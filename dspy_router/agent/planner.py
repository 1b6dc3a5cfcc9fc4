"""The steps that the route leaves to a planner: an LM that sees the run so far, as `dspy.ReAct`'s does."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_router.agent.driving import ModuleCall, Steps
from dspy_router.agent.progress import Progress
from dspy_router.errors import RouteError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is to be done next.

    Attributes:
        tool: The tool's name, or `finish`.
        arguments: What it is to be called with; None if nothing was said of that.
        thought: What a planner said before.
    """

    tool: str
    arguments: Any = None
    thought: str | None = None


def planned(planner: dspy.Module, progress: Progress) -> Steps[Plan | None]:
    """The planner's next step, or None if what it answered cannot be read.

    Raises:
        RouteError: If it is a whole `dspy.ReAct`, or answers without a `next_tool_name`.
    """
    if isinstance(planner, dspy.ReAct):
        raise RouteError("The fallback is a dspy.ReAct, which runs a loop of its own. Give its planner: react.react.")
    text = trajectory_text(progress.trajectory(cut=True))
    try:
        answer = yield ModuleCall(planner, {**progress.inputs, "trajectory": text})
    except (dspy.AdapterParseError, dspy.ContextWindowExceededError) as error:
        logger.warning("The run ends here, since the fallback gave no plan: %r", error)
        return None
    if "next_tool_name" not in answer:
        raise RouteError(
            f"The fallback gave {list(answer.keys())}, without 'next_tool_name'. Give a planner with that output and, "
            "if it writes arguments, 'next_tool_args', such as the `react` predictor of a dspy.ReAct."
        )
    arguments = answer.get("next_tool_args")
    if isinstance(arguments, str):
        with suppress(ValueError):  # what is no JSON is refused as it is
            arguments = json.loads(arguments)
    return Plan(str(answer["next_tool_name"]), arguments, answer.get("next_thought"))


def trajectory_text(trajectory: Mapping[str, Any]) -> str:
    """A trajectory as `dspy.ReAct` shows it to its planner."""
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    return str(adapter.format_user_message_content(dspy.Signature(f"{', '.join(trajectory)} -> x"), dict(trajectory)))
