"""An agent loop whose steps are decided by a route.

The names below load on first use, as those of `dspy_router` do.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.agent.errors import AgentError
    from dspy_router.agent.progress import Progress, ToolResult
    from dspy_router.agent.routed_agent import RoutedAgent
    from dspy_router.agent.state import StepState

_HOMES = {
    "AgentError": "errors",
    "Progress": "progress",
    "RoutedAgent": "routed_agent",
    "StepState": "state",
    "ToolResult": "progress",
}

__all__ = ["AgentError", "Progress", "RoutedAgent", "StepState", "ToolResult"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
