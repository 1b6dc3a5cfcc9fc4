"""Feedback: one row to learn from, and its JSONL form: lines of rows, and of rewards that arrived after them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Literal

from dspy_router.errors import RouteError
from dspy_router.logs.late_rewards import LateReward, join_rewards
from dspy_router.logs.rotation import open_in_time_order
from dspy_router.tables import table

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
        candidates: Names of the options there were; empty for all of the field's, where these are very many.
        chosen: The option taken.
        propensity: Probability with which it was taken, in (0, 1]; None if unknown.
        reward: The metric's number for the whole run; 1 for a label; None if not known (yet).
        sole: Whether the reward speaks of this decision alone: it was the run's only one, or was rewarded itself.
        probabilities: The probability of each option by name, under whatever decided, if it gives them; of very many
            options, of the likeliest.
        cost: Dollars the run's LM calls cost; None if unknown.
        tokens: Tokens the run's LM calls took; None if not counted.
        error: What the run or the metric raised, if anything.
        run: Key of the run; the decisions of a run share it. Empty if the row stands alone.
        id: The decision's id, which a later reward can name.
        encoder: Weights digest of the encoder that read the text; empty if unknown.
        weight: How much the word of a label or a teacher counts, above 0. What was tried counts by its reward.
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
    weight: float = 1.0

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

        A reward that is not finite becomes an `error`, since JSON has no such number.

        Example:
            >>> row = Feedback("label", "7", "self", "tool", "how far?", ("map", "mail"), "map", 1.0, 1.0)
            >>> Feedback.from_json(row.to_json()) == row
            True
            >>> from dataclasses import replace
            >>> failed = replace(row, reward=math.nan).to_json()
            >>> Feedback.from_json(failed).reward, Feedback.from_json(failed).error
            (None, 'reward is nan')
        """
        return json.dumps(_finite(vars(self)), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Feedback":
        """Read a line that `to_json` wrote.

        Raises:
            RouteError: If it is no such line.
        """
        try:
            return _row(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RouteError(f"This is no feedback row: {line[:80]!r} ({error}).") from error


@dataclass(frozen=True)
class FeedbackTable:
    """Rows that were read, and what was passed over.

    Attributes:
        rows: The usable rows, in the order they were found.
        skipped: How many entries were passed over, by reason.
    """

    rows: tuple[Feedback, ...]
    skipped: Mapping[str, int]

    def __str__(self) -> str:
        return table(self._lines(), headers=("feedback", "count"), disable_numparse=False)

    def _repr_html_(self) -> str:
        lines = [(escape(name), count) for name, count in self._lines()]
        return table(lines, headers=("feedback", "count"), form="unsafehtml", disable_numparse=False)

    def _lines(self) -> list[tuple[str, int]]:
        return [
            ("rows", len(self.rows)),
            ("rows with a reward", sum(row.has_reward for row in self.rows)),
            ("rows with a propensity", sum(row.has_propensity for row in self.rows)),
            *((f"passed over: {reason}", count) for reason, count in self.skipped.items()),
        ]


def write_feedback(rows: Iterable[Feedback], path: str | Path) -> None:
    """Write rows as JSONL, one a line."""
    Path(path).write_bytes(b"".join(encoded(row.to_json()) for row in rows))


def read_feedback(path: str | Path) -> list[Feedback]:
    """Read the rows of a `FeedbackLog`, with the rewards that arrived later, or of a file of `write_feedback`.

    Raises:
        FileNotFoundError: If there is no such file.
        RouteError: If there is no feedback row in it; `read_feedback_table` tells what was passed over.
    """
    return list(read_feedback_table(path).rows)


def read_feedback_table(path: str | Path) -> FeedbackTable:
    """`read_feedback` that also tells what was passed over.

    Rotated files are read with the current one, oldest first. Of several rewards for one decision the last counts;
    a decision's own reward overrules its run's, whichever came first. A decision that was written more than once
    counts once, in its last form. A damaged line is passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        RouteError: If there is no feedback row in it.
    """
    rows: dict[str | int, Feedback] = {}
    rewards: list[LateReward] = []
    skipped: Counter[str] = Counter()
    with open_in_time_order(Path(path)) as files:
        for number, line in enumerate(line for file in files for line in file if line.strip()):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                skipped["damaged line"] += 1
                continue
            try:
                if "candidates" not in entry:
                    rewards.append(LateReward.from_entry(entry))
                    continue
                row = _row(entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                skipped["neither a feedback row nor a reward"] += 1
                continue
            key = row.id or number
            if key in rows:
                skipped["decision written again"] += 1
            rows[key] = row
    joined, unknown = join_rewards(list(rows.values()), rewards)
    return feedback_table(joined, skipped + Counter(unknown), f"The file {str(path)!r}")


def feedback_table(rows: Sequence[Feedback], skipped: Mapping[str, int], where: str) -> FeedbackTable:
    """Rows and what was passed over in reading them from `where`.

    Raises:
        RouteError: If there is no row.
    """
    if not rows:
        why = "; ".join(f"{reason} ({count})" for reason, count in skipped.items()) or "it is empty"
        raise RouteError(f"{where} holds no usable feedback row: {why}.")
    return FeedbackTable(tuple(rows), dict(skipped))


def split_feedback(
    rows: Sequence[Feedback], share: float = 0.5, *, seed: int = 0
) -> tuple[list[Feedback], list[Feedback]]:
    """Split rows in two, one part to learn from and one to judge by, so that no request is in both.

    All rows of a run stay together, and so do all runs of one request: those whose first rows have the same text. Which
    part a request belongs to depends on its text, `seed` and `share` alone, not on the other rows: a request that was
    learned from is never judged by, however much the log has grown since.

    Args:
        rows: Rows in the order they were logged.
        share: Of the requests, how many are in the first part, on average, in (0, 1).
        seed: Another seed gives another split.

    Raises:
        RouteError: If `share` is out of range, or a part would be empty.

    Example:
        >>> rows = [
        ...     Feedback("log", "", "", field, text, ("a", "b"), "a", 0.5, 1.0, run=str(run))
        ...     for run, request in enumerate(["one", "two", "one", "three", "four"])
        ...     for field, text in (("topic", request), ("tool", f"topic a: {request}"))
        ... ]
        >>> learned, judged = split_feedback(rows)
        >>> sorted({row.text for row in judged}), len(learned)
        (['three', 'topic a: three'], 8)
    """
    if not 0 < share < 1:
        raise RouteError(f"share={share!r} is no share of requests: give a number in (0, 1), such as 0.5.")
    parts: tuple[list[Feedback], list[Feedback]] = ([], [])
    for row, first in zip(rows, first_of_run(rows), strict=True):
        drawn = int(text_key(f"{seed} {first.text}"), 16) / 16**16
        parts[drawn >= share].append(row)
    if not all(parts):
        requests = len({first.text for first in first_of_run(rows)})
        raise RouteError(
            f"{len(rows):,} rows of {requests:,} requests cannot be split at share={share:g}: all fall into one part. "
            "Log more requests, or take another seed."
        )
    return parts


def first_of_run(rows: Sequence[Feedback]) -> list[Feedback]:
    """For each row, the first row of its run, whose text is the run's request; a row that stands alone is its own."""
    firsts: dict[str, Feedback] = {}
    return [firsts.setdefault(row.run, row) if row.run else row for row in rows]


def text_key(text: str) -> str:
    """A short key that stands for an input text: rows of equal texts compare with one another."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def encoded(line: str) -> bytes:
    """A line of JSON as it stands in a file."""
    try:
        return line.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot hold but JSON can escape
        return json.dumps(json.loads(line)).encode("ascii") + b"\n"


_FIELDS = frozenset(field.name for field in fields(Feedback))


def _row(entry: Any) -> Feedback:
    """A row from its JSON object; whatever is wrong with it is a ValueError, TypeError, KeyError or AttributeError."""
    known = {key: value for key, value in entry.items() if key in _FIELDS}  # not those of a later release
    row = Feedback(**_finite(known | {"candidates": tuple(entry["candidates"])}))
    names = (row.source, row.example, row.route, row.field, row.text, row.chosen, row.run, row.id, row.encoder)
    if not all(isinstance(name, str) for name in (*names, *row.candidates)):
        raise TypeError("a name or a text is none")
    if not all(isinstance(number, (int, float, type(None))) for number in (row.propensity, row.reward, row.cost)):
        raise TypeError("a number is none")
    if not 0 < row.weight < math.inf:
        raise ValueError("the weight is not above 0")
    return row


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row without numbers that are not finite: they are unknown, or the reason why there is no reward."""
    finite = dict(entry)
    for key in ("reward", "propensity", "cost"):
        value = entry.get(key)
        if isinstance(value, float) and not math.isfinite(value):
            finite[key] = None
            if key == "reward":
                finite["error"] = entry.get("error") or f"reward is {value}"
    if (probabilities := entry.get("probabilities")) and not all(map(math.isfinite, probabilities.values())):
        finite["probabilities"] = None
    return finite
