"""The error of a run that could not be ended."""

from collections.abc import Mapping
from typing import Any

from dspy_router.errors import RouteError


class AgentError(RouteError):
    """A module that the agent needs raised, usually because the LM is down, or a function that makes arguments.

    The cause is the error's `__cause__`.

    Attributes:
        trajectory: The run so far, in the keys of `dspy.ReAct`.
    """

    def __init__(self, message: str, trajectory: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.trajectory = trajectory

    def __reduce__(self) -> tuple[type["AgentError"], tuple[str, Mapping[str, Any]]]:
        return type(self), (str(self), self.trajectory)  # across processes
