"""Feedback: one row to learn from, and its JSONL form."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dspy_router.errors import RouteError

Source = Literal["label", "teacher", "rollout"]


@dataclass(frozen=True)
class Feedback:
    """What one decision taught.

    Attributes:
        source: Where the row comes from: a gold label, a teacher's decision or a rollout.
        example: Key of the example the decision belongs to.
        route: Name of the route in its program, as `named_sub_modules` gives it.
        field: The output field decided.
        occurrence: Which of the route's calls in the run this was, from 0.
        text: The input text the encoder read.
        candidates: Names of the options there were.
        chosen: The option taken.
        propensity: Probability with which it was taken, in (0, 1]; None if unknown.
        reward: The metric's number for the whole run; 1 for a label.
        sole: Whether this was the only decision of the run, so that its reward speaks of it alone.
        probabilities: A teacher's probability for each option, if it gives them.
        cost: Dollars the run's LM calls cost; None if unknown.
        error: What the run or the metric raised, if anything.
    """

    source: Source
    example: str
    route: str
    field: str
    text: str
    candidates: tuple[str, ...]
    chosen: str
    propensity: float | None
    reward: float
    occurrence: int = 0
    sole: bool = True
    probabilities: dict[str, float] | None = None
    cost: float | None = None
    error: str | None = None

    def to_json(self) -> str:
        """The row as one line of JSON.

        Example:
            >>> row = Feedback("label", "7", "self", "tool", "how far?", ("map", "mail"), "map", 1.0, 1.0)
            >>> Feedback.from_json(row.to_json()) == row
            True
        """
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Feedback":
        """Read a line that `to_json` wrote.

        Raises:
            RouteError: If it is no such line.
        """
        try:
            entry: dict[str, Any] = json.loads(line)
            known = {field.name for field in fields(cls)}
            return cls(**{key: value for key, value in entry.items() if key in known} | {
                "candidates": tuple(entry["candidates"])
            })  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RouteError(f"This is no feedback row: {line[:80]!r} ({error}).") from error


def write_feedback(rows: Iterable[Feedback], path: str | Path) -> None:
    """Write rows as JSONL, one a line."""
    Path(path).write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def read_feedback(path: str | Path) -> list[Feedback]:
    """Read rows written by `write_feedback`.

    Raises:
        RouteError: If a line is no feedback row.
    """
    return [Feedback.from_json(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
