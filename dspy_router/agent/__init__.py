"""An agent loop whose steps are decided by a route.

The names below load on first use, as those of `dspy_router` do.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.agent.dialogues import read_dialogues
    from dspy_router.agent.errors import AgentError
    from dspy_router.agent.imitation import Episode, Step, imitation_rows, react_episode, split_by_task
    from dspy_router.agent.progress import Progress, ToolResult
    from dspy_router.agent.routed_agent import RoutedAgent
    from dspy_router.agent.state import StepState

_HOMES = {
    "AgentError": "errors",
    "Episode": "imitation",
    "Progress": "progress",
    "RoutedAgent": "routed_agent",
    "Step": "imitation",
    "StepState": "state",
    "ToolResult": "progress",
    "imitation_rows": "imitation",
    "react_episode": "imitation",
    "read_dialogues": "dialogues",
    "split_by_task": "imitation",
}

__all__ = [
    "AgentError",
    "Episode",
    "Progress",
    "RoutedAgent",
    "Step",
    "StepState",
    "ToolResult",
    "imitation_rows",
    "react_episode",
    "read_dialogues",
    "split_by_task",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
