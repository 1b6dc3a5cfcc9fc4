"""Feedback: one row to learn from, and its JSONL form."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dspy_router.errors import RouteError

Source = Literal["label", "synthetic", "teacher", "rollout", "log"]


@dataclass(frozen=True)
class Feedback:
    """What one decision taught.

    Attributes:
        source: Where the row comes from: a gold label, a synthetic example's label, a teacher's decision, a
            rollout, or a log of production.
        example: Key of the example the decision belongs to; rows with the same key compare with one another.
        route: Name of the route in its program, as `named_sub_modules` gives it; empty if the logger did not know
            the program, in which case `field` and `candidates` tell.
        field: The output field decided.
        occurrence: Which of the route's calls in the run this was, from 0.
        text: The input text the encoder read.
        candidates: Names of the options there were.
        chosen: The option taken.
        propensity: Probability with which it was taken, in (0, 1]; None if unknown.
        reward: The metric's number for the whole run; 1 for a label; None if not known (yet).
        sole: Whether the reward speaks of this decision alone: it was the run's only one, or was rewarded itself.
        probabilities: The probability of each option by name, under whatever decided, if it gives them.
        cost: Dollars the run's LM calls cost; None if unknown.
        tokens: Tokens the run's LM calls took; None if not counted.
        error: What the run or the metric raised, if anything.
        run: Key of the run; the decisions of a run share it. Empty if the row stands alone.
        id: The decision's id, which a later reward can name.
        encoder: Weights digest of the encoder that read the text; empty if unknown.
    """

    source: Source
    example: str
    route: str
    field: str
    text: str
    candidates: tuple[str, ...]
    chosen: str
    propensity: float | None
    reward: float | None
    occurrence: int = 0
    sole: bool = True
    probabilities: dict[str, float] | None = None
    cost: float | None = None
    tokens: int | None = None
    error: str | None = None
    run: str = ""
    id: str = ""
    encoder: str = ""

    @property
    def has_propensity(self) -> bool:
        """Whether the propensity is one that objectives can weigh with: a number in (0, 1]."""
        return self.propensity is not None and 0.0 < self.propensity <= 1.0

    @property
    def has_reward(self) -> bool:
        """Whether the reward is a finite number."""
        return self.reward is not None and math.isfinite(self.reward)

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
