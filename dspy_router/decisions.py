"""Decisions, the context-local record of them, and the context-local override that makes them.

Both live in `dspy.settings.context`, so DSPy's worker threads and async tasks inherit them, the way
`record_evidence` in DSPy does it. DSPy's own trace is left alone: only `Predict` belongs there.
"""

import dataclasses
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import dspy

from dspy_router.tracing import trace_decision

if TYPE_CHECKING:
    from dspy_router.logs.feedback_log import FeedbackLog, LoggedRun


@dataclass(frozen=True)
class Decision:
    """The choice made for one output field of one call.

    Attributes:
        field: The output field decided.
        name: The option chosen.
        probabilities: Option name to probability under the head, in declaration order; they sum to one.
        confidence: The chosen option's probability, in [0, 1].
        propensity: The probability with which this option was chosen by whatever chose it, in (0, 1]. It is 1
            when the likeliest option is taken, which is what a route does unless it is told to explore.
        text: The input text the encoder read.
        empty_input: True if there was no text, so that the head's bias alone decided.
        abstained: True if the route declined. `name` is then what the fallback chose, or without one what the route
            would have; nobody learns from it.
        score: How far the decision can be relied on, higher being surer; only where a guard is set.
        id: Unique; a reward that arrives later can name it.
    """

    field: str
    name: str
    probabilities: Mapping[str, float]
    confidence: float
    propensity: float
    text: str
    empty_input: bool = False
    abstained: bool = False
    score: float | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


class Recorder(Protocol):
    """What a recording context provides: it is told of each decision as it is made."""

    def record(self, route: Any, decision: Decision) -> None:
        """Take note of a decision that `route` has just made."""


class Chooser(Protocol):
    """What an override provides: the option to take, and the propensity with which it is taken."""

    def choose(
        self, route: Any, field: str, probabilities: Mapping[str, float], selected: str
    ) -> tuple[int, float] | None:
        """The option's index and propensity, or None to leave the one selected.

        Args:
            route: Decides.
            field: What it decides.
            probabilities: Of the options that can be taken.
            selected: The option that is taken without an override.
        """


class _DecisionList:
    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self._lock = threading.Lock()

    def record(self, route: Any, decision: Decision) -> None:
        with self._lock:
            self.decisions.append(decision)


@overload
def record_decisions() -> AbstractContextManager[list[Decision]]: ...
@overload
def record_decisions(
    path: "str | Path | FeedbackLog", *, program: dspy.Module | None = None
) -> AbstractContextManager["LoggedRun"]: ...
def record_decisions(
    path: "str | Path | FeedbackLog | None" = None, *, program: dspy.Module | None = None
) -> AbstractContextManager["list[Decision] | LoggedRun"]:
    """Collect the decisions made inside the block, in the order they were made.

    DSPy's worker threads (`dspy.Parallel`, `Evaluate`, `asyncify`) and async tasks started inside the block
    are included. Blocks nest: an outer one sees what an inner one sees. Where both write to one log, a decision is
    the inner one's.

    With a path, every decision is also appended to a log as a `Feedback` row, for `RouteFinetune` to learn from.
    The block is then one run: what it yields takes the run's reward. Failing to write never raises here.

    Args:
        path: A `FeedbackLog`, or the path of one.
        program: The program that runs inside the block, so that the rows can name its routes.

    Returns:
        A context manager. Without a path it yields a growing list of `Decision`; with one, a `LoggedRun`, which is
        a sequence of the latest decisions and has `reward(...)`.

    Example:
        >>> import numpy as np
        >>> from dspy_router import DifferentiableRoute, record_decisions
        >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
        >>> with record_decisions() as decisions:
        ...     prediction = route(text="a fig, if I may")
        >>> decisions[0].field, decisions[0].name
        ('fruit', 'fig')

        A log, and a reward that comes after the answer:

        >>> import tempfile
        >>> from dspy_router.feedback import read_feedback
        >>> path = tempfile.mkdtemp() + "/decisions.jsonl"
        >>> with record_decisions(path, program=route) as run:
        ...     prediction = route(text="a fig, if I may")
        >>> run.reward(0.5)
        >>> [(row.route, row.chosen, row.propensity, row.reward) for row in read_feedback(path)]
        [('self', 'fig', 1.0, 0.5)]
    """
    if path is None:
        return _collected()
    return _logged(path, program)


@contextmanager
def _collected() -> Iterator[list[Decision]]:
    collected = _DecisionList()
    with recording(collected):
        yield collected.decisions


@contextmanager
def _logged(path: "str | Path | FeedbackLog", program: dspy.Module | None) -> Iterator["LoggedRun"]:
    from dspy_router.clients.decision_client import named_routes
    from dspy_router.logs.feedback_log import FeedbackLog, LoggedRun

    log = path if isinstance(path, FeedbackLog) else FeedbackLog(path)
    routes = {} if program is None else named_routes(program)
    run = LoggedRun(log, routes)
    with recording(run):
        yield run


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of every decision made inside the block."""
    with dspy.settings.context(_route_recorders=(*dspy.settings.get("_route_recorders", ()), recorder)):
        yield


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Let `chooser` make the decisions inside the block; the innermost block wins."""
    with dspy.settings.context(_route_chooser=chooser):
        yield


def announce(route: Any, decision: Decision) -> None:
    """Hand a decision to the current span and to every recorder of the current context."""
    trace_decision(route, decision)
    for recorder in dspy.settings.get("_route_recorders", ()):
        recorder.record(route, decision)


def decide(
    route: Any,
    field: str,
    probabilities: Mapping[str, float],
    selected: str,
    text: str,
    possible: Collection[str] | None = None,
    score: float | None = None,
) -> Decision:
    """Make and announce a decision: the option the current context's chooser takes, or without one `selected`.

    Where only some options are `possible`, the chooser sees no other.
    """
    open_ = probabilities if possible is None else {option: probabilities[option] for option in possible}
    index, propensity = overridden(route, field, open_, selected) or (None, 1.0)
    name = selected if index is None else list(open_)[index]
    decision = Decision(
        field=field,
        name=name,
        probabilities=probabilities,
        confidence=probabilities[name],
        propensity=propensity,
        text=text,
        empty_input=not text.strip(),
        score=score,
    )
    announce(route, decision)
    return decision


def overridden(route: Any, field: str, probabilities: Mapping[str, float], selected: str) -> tuple[int, float] | None:
    """The choice of the current context's chooser, or None where there is none."""
    chooser: Chooser | None = dspy.settings.get("_route_chooser", None)
    return None if chooser is None else chooser.choose(route, field, probabilities, selected)
