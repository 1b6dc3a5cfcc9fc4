"""The one error class of the package."""

from collections.abc import Mapping
from typing import Any


class RouteError(ValueError):
    """Something given to a route or an optimizer cannot be used.

    The message says what was wrong, what was expected and what to do next, and quotes the value.
    It is a `ValueError`, so code that guards DSPy calls with `except ValueError` keeps working.
    """


class AbstainError(RouteError):
    """A route with `on_abstain="raise"` declined to decide.

    Attributes:
        decisions: By field, the decisions that were not made, with their probabilities.
    """

    def __init__(self, message: str, decisions: "Mapping[str, Any]") -> None:
        super().__init__(message)
        self.decisions = decisions

    def __reduce__(self) -> "tuple[type[AbstainError], tuple[str, Mapping[str, Any]]]":
        return type(self), (str(self), self.decisions)  # across processes
