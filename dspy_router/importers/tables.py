"""Feedback from a table of decisions: JSONL or CSV, with the columns named by whoever reads it."""

import csv
import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback, FeedbackTable, feedback_table, text_key
from dspy_router.logs.late_rewards import as_reward

Column = str | Callable[[Mapping[str, Any]], Any]
"""Where a value is found in a row of the table: the column's name, or a function of the row."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")


class _Unusable(Exception):  # noqa: N818
    """Why a row of the table gives no feedback."""


def read_table(
    path: str | Path,
    *,
    text: Column,
    chosen: Column,
    field: str,
    reward: Column | None = None,
    propensity: Column | None = None,
    candidates: Column | Sequence[str] | None = None,
    cost: Column | None = None,
    example: Column | None = None,
    run: Column | None = None,
    route: str = "",
) -> FeedbackTable:
    r"""Read feedback from a table in which a row is a decision.

    The file is `.jsonl`, `.ndjson`, `.csv` or `.tsv` in UTF-8, the latter two with a header, and may end in `.gz`.
    Numbers may be written as text; a reward may be `true` or `false`. An empty cell, null or NaN is a value that is
    not known. Rows that cannot be used are passed over and counted by reason.

    Args:
        path: The file.
        text: The column of the text the decision was made from. What a route with several inputs reads is
            `lambda row: route.text({"question": row["question"], ...})`.
        chosen: The column of the option taken.
        field: The name of the output field that was decided; not a column.
        reward: The column of the reward. A row without one is passed over, unless this is None: then no row has any.
        propensity: The column of the probability with which the option was taken. It is kept as it is, in (0, 1] or
            not.
        candidates: The options there were: their names, or the column that lists them as JSON. By default, every
            option that some row of the table chose.
        cost: The column of the run's dollars.
        example: The column of the key by which rows compare with one another; by default equal texts do.
        run: The column of the run's key, for runs of several decisions: a reward is for all rows of its run.
        route: The name of the route in its program, as `named_sub_modules` gives it; not a column.

    Raises:
        RouteError: If the file has another form, lacks a column, or no row can be used.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = path.write_text("question,tool,ok\nhow far?,map,true\nwrite to Ann,map,false\n,mail,true\n")
        >>> table = read_table(path, text="question", chosen="tool", reward="ok", field="tool",
        ...                    candidates=["map", "mail"])
        >>> [(row.text, row.chosen, row.reward) for row in table.rows]
        [('how far?', 'map', 1.0), ('write to Ann', 'map', 0.0)]
        >>> print(table)
        feedback                  count
        ----------------------  -------
        rows                          2
        rows with a reward            2
        rows with a propensity        0
        passed over: no text          1
    """
    path = Path(path)
    columns = _Columns(text, chosen, reward, propensity, cost, example, run)
    entries, skipped = _entries(path)
    _require_columns(path, entries, [*vars(columns).values(), candidates if isinstance(candidates, str) else None])
    if candidates is None:
        candidates = list(dict.fromkeys(str(name) for entry in entries if (name := _cell(entry, chosen)) is not None))
    sizes = Counter(str(_cell(entry, run)) for entry in entries)
    rows = []
    for entry in tqdm(entries, desc=f"reading {path.name}", unit="row", delay=2):
        try:
            row = columns.feedback(entry, _candidates(entry, candidates), field, route)
        except _Unusable as reason:
            skipped[str(reason)] += 1
            continue
        rows.append(replace(row, sole=not row.run or sizes[row.run] == 1))
    return feedback_table(rows, skipped, f"The table {str(path)!r}")


@dataclass(frozen=True)
class _Columns:
    """Where in a row of the table everything is found."""

    text: Column
    chosen: Column
    reward: Column | None
    propensity: Column | None
    cost: Column | None
    example: Column | None
    run: Column | None

    def feedback(self, entry: Mapping[str, Any], candidates: tuple[str, ...], field: str, route: str) -> Feedback:
        text, chosen = _cell(entry, self.text), _cell(entry, self.chosen)
        if text is None or not str(text).strip():
            raise _Unusable("no text")
        if chosen is None:
            raise _Unusable("no chosen option")
        if str(chosen) not in candidates:
            raise _Unusable("the chosen option is not among the candidates")
        reward = _number(entry, self.reward, "reward")
        if reward is None and self.reward is not None:
            raise _Unusable("no reward")
        example, run = _cell(entry, self.example), _cell(entry, self.run)
        return Feedback(
            source="log",
            example=text_key(str(text)) if example is None else str(example),
            route=route,
            field=field,
            text=str(text),
            candidates=candidates,
            chosen=str(chosen),
            propensity=_number(entry, self.propensity, "propensity"),
            reward=reward,
            cost=_number(entry, self.cost, "cost"),
            run="" if run is None else str(run),
        )


def _cell(entry: Mapping[str, Any], column: Column | None) -> Any:
    """A value of a row, or None if there is none."""
    if column is None:
        return None
    value = column(entry) if callable(column) else entry.get(column)
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def _number(entry: Mapping[str, Any], column: Column | None, what: str) -> float | None:
    value = _cell(entry, column)
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0, "nan": None}.get(value.strip().lower(), value)
    if value is None:
        return None
    number, error = as_reward(value)
    if error is not None:
        raise _Unusable(f"the {what} is no finite number")
    return number


def _candidates(entry: Mapping[str, Any], candidates: Column | Sequence[str]) -> tuple[str, ...]:
    names = _cell(entry, candidates) if isinstance(candidates, str) or callable(candidates) else candidates
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except ValueError:
            names = None
    if not isinstance(names, (list, tuple)):
        raise _Unusable("the candidates are no list of names")
    return tuple(map(str, names))


def _require_columns(path: Path, entries: Sequence[Mapping[str, Any]], columns: Sequence[Column | None]) -> None:
    found = list(dict.fromkeys(name for entry in entries for name in entry))
    if absent := [name for name in columns if isinstance(name, str) and name not in found]:
        raise RouteError(f"The table {str(path)!r} has no column {absent}; its columns are {found}.")


def _entries(path: Path) -> tuple[list[Mapping[str, Any]], Counter[str]]:
    """The table's rows, and how many lines were passed over, by reason."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    skipped: Counter[str] = Counter()
    opener: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
    try:
        # A byte order mark, as spreadsheets write it, is no part of the first column's name.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if suffix in LINES:
                return list(_json_rows(file, skipped)), skipped
            if suffix in DELIMITERS:
                return list(_csv_rows(file, DELIMITERS[suffix], skipped)), skipped
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as error:
        raise RouteError(f"The table {str(path)!r} cannot be read: {error}. Save it as UTF-8 text.") from error
    raise RouteError(
        f"The table {str(path)!r} ends in {suffix!r}; expected one of {[*LINES, *DELIMITERS]}, or with .gz."
    )


def _json_rows(file: TextIO, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for line in file:
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            yield entry
        else:
            skipped["damaged line"] += 1


def _csv_rows(file: TextIO, delimiter: str, skipped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for entry in csv.DictReader(file, delimiter=delimiter):
        if None in entry:
            skipped["more cells than columns"] += 1
        else:
            yield entry
