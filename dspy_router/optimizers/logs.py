"""Logged feedback, made ready for the routes of a program: what fits is kept, what does not is counted by reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dspy_router.feedback import Feedback, read_feedback_table
from dspy_router.fields import DecisionField
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.rollouts import KeyedExample
from dspy_router.optimizers.runs import Routes, decided_fields
from dspy_router.optimizers.sources import likely_texts


@dataclass(frozen=True)
class LoggedFeedback:
    """Rows that can be learned from, and what to know of the others.

    Attributes:
        rows: With the name of the route they are for.
        set_aside: Rows left out, by reason.
        noted: Rows kept that not every objective can use, by reason.
    """

    rows: list[Feedback]
    set_aside: Counter[str]
    noted: Counter[str]


def logged_feedback(
    feedback: Sequence[Feedback] | str | Path, routes: Routes, reading: RewardReading | None = None
) -> LoggedFeedback:
    """Read rows, or a log file, for the routes of a program.

    A row is for the route it names or, if it names none, for the only one that decides its field among its candidates.
    Rows made with another encoder are kept, since they hold the text, which is encoded anew. A propensity that is
    missing or outside (0, 1] is dropped: the row then teaches only where none is needed. Where costs count, a row must
    say what its run cost.

    Raises:
        FileNotFoundError: If there is no such file.
        RouteError: If the file holds no feedback row.
    """
    set_aside: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    fields = decided_fields(routes)
    if isinstance(feedback, (str, Path)):
        table = read_feedback_table(feedback)
        feedback = table.rows
        set_aside += Counter({f"in the log: {reason}": count for reason, count in table.skipped.items()})
    rows = []
    for row in feedback:
        owners = [
            name
            for name, route in routes.items()
            if row.route in ("", name) and any(_fits(row, field) for field in route.decision_fields)
        ]
        if len(owners) != 1:
            set_aside[_misfit(row, routes) if not owners else "rows that may be of several routes"] += 1
        elif row.candidates and row.chosen not in row.candidates:
            set_aside["rows that chose none of their candidates"] += 1
        elif not row.has_reward and row.source not in ("label", "synthetic", "teacher"):
            set_aside["rows with an error in place of a reward" if row.error else "rows without a reward"] += 1
        elif reading is not None and reading.cost_weight and row.has_reward and not reading.knows_cost(row):
            set_aside[f"rows that do not say what they cost in {reading.cost_unit}"] += 1
        else:
            if row.encoder and row.encoder != routes[owners[0]].encoder.fingerprint.weights[: len(row.encoder)]:
                noted["rows made with another encoder, encoded anew"] += 1
            if 0 < len(set(row.candidates)) < len(fields[owners[0], row.field].options):
                noted["rows with fewer candidates than there are options"] += 1
            if not row.has_propensity and row.source in ("log", "rollout"):
                noted[f"rows with propensity {_named(row.propensity)}, used where none is needed"] += 1
            propensity = row.propensity if row.has_propensity else None
            rows.append(replace(row, route=owners[0], propensity=propensity))
    return LoggedFeedback(rows, set_aside, noted)


def with_example_keys(rows: Sequence[Feedback], routes: Routes, examples: Sequence[KeyedExample]) -> list[Feedback]:
    """The rows, those about a text that some example gives the route with that example's key.

    So a log settles the examples it speaks of, and an example's label overrules what the log tells of its text.
    """
    keys: dict[tuple[str, str], str] = {}
    for name, route in routes.items():
        for entry, text in zip(examples, likely_texts(route, examples), strict=True):
            if text is not None:
                keys.setdefault((name, text), entry.key)
    return [replace(row, example=keys.get((row.route, row.text), row.example)) for row in rows]


def _fits(row: Feedback, field: DecisionField) -> bool:
    """Whether the row decides the field among its options, or among some: a call had candidates, or there are new."""
    return row.field == field.name and field.positions.keys() >= set(row.candidates or [row.chosen])


def _misfit(row: Feedback, routes: Routes) -> str:
    if not any(row.field == field.name for field in decided_fields(routes).values()):
        return "rows of a field that no route decides"
    if row.route and row.route not in routes:
        return "rows of a route that the program does not have"
    return "rows from other options"


def _named(propensity: float | None) -> str:
    if propensity is None:
        return "missing"
    return "0 or less" if propensity <= 0 else "above 1" if propensity > 1 else "not a number"
