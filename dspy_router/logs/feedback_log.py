"""A log of production: every decision is appended as it is made, its reward when it is known.

Lines are appended under a lock between processes, each call's in one write, so that any number of threads and
processes may share a log. A process that dies while writing leaves at most one line cut short; the next writer
begins a new line, and readers pass over the cut one. There is no `fsync`: what the system had not yet put on disk
is lost with the machine's power.
"""

import errno
import logging
import os
import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakKeyDictionary

from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback, FeedbackTable, encoded, read_feedback_table, text_key
from dspy_router.logs.late_rewards import LateReward
from dspy_router.logs.rotation import rotate
from dspy_router.probabilities import Probabilities, likeliest

if TYPE_CHECKING:
    from dspy_router.decisions import Decision

logger = logging.getLogger(__name__)

LOCK_SECONDS = 10.0  # how long a writer waits for the others
REQUEST_LOCK_SECONDS = 0.25  # the same inside a request, which must not stall
LOCK_POLL_SECONDS = 0.001
KEPT_DECISIONS = 1_000  # that a logged run holds in memory
LOGGED = 20  # probabilities in a row, of so many options that all of them would make it megabytes long

_failing: set[Path] = set()  # logs that this process could not write to when it last tried


class FeedbackLog:
    """An append-only JSONL log of feedback rows, safe under many threads and many processes.

    `read_feedback(path)` reads it. All writers of a log must give the same `max_bytes` and `backups`. Beside the log
    stands an empty `<path>.lock`.

    Args:
        path: The file; its folder is made if missing.
        max_bytes: When a write would make the file larger than this, the file becomes `<path>.1`, that one
            `<path>.2`, and so on, and a new file is begun.
        backups: How many of those to keep, the oldest dropped; None, the default, drops nothing.

    Raises:
        RouteError: If `max_bytes` or `backups` is less than one.

    Example:
        >>> import tempfile
        >>> log = FeedbackLog(tempfile.mkdtemp() + "/decisions.jsonl")
        >>> log.append(Feedback("log", "7", "self", "tool", "how far?", ("map", "mail"), "map", 0.9, None, id="4f1c"))
        >>> log.reward("4f1c", 1.0)
        >>> log.read().rows[0].reward
        1.0
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 100_000_000, backups: int | None = None) -> None:
        for name, value in (("max_bytes", max_bytes), ("backups", backups)):
            if value is not None and value < 1:
                raise RouteError(f"{name}={value!r}: give at least 1{' or None' if name == 'backups' else ''}.")
        self.path = Path(path).absolute()
        self.max_bytes = max_bytes
        self.backups = backups

    def append(self, *rows: Feedback) -> None:
        """Append rows in one write.

        Raises:
            OSError: If the file cannot be written (nothing of these rows is left in it then), or other writers hold
                the lock for ten seconds.
        """
        self.write([row.to_json() for row in rows], timeout=LOCK_SECONDS)

    def reward(self, decision_id: str, reward: Any, *, cost: float | None = None) -> None:
        """Give one decision its reward, whenever it becomes known; a later one overrules it.

        Args:
            decision_id: The decision's `id`.
            reward: A number, a bool or a prediction with `score`. What is no finite number is kept as the row's
                `error`, and the row has no reward.
            cost: Dollars the run's LM calls cost, if known.

        Raises:
            OSError: As for `append`.
        """
        self.write([LateReward.of(reward, decision=decision_id, cost=cost).to_json()], timeout=LOCK_SECONDS)

    def reward_run(self, run: str, reward: Any, *, cost: float | None = None, decisions: int | None = None) -> None:
        """Give all decisions of a run one reward; a decision that gets its own keeps that.

        Args:
            run: The run's key.
            reward: As for `reward`.
            cost: Dollars the run's LM calls cost, if known.
            decisions: How many decisions the run made, if known. Only the reward of a lone decision is `sole`.

        Raises:
            OSError: As for `append`.
        """
        late = LateReward.of(reward, run=run, decisions=decisions, cost=cost)
        self.write([late.to_json()], timeout=LOCK_SECONDS)

    def read(self) -> FeedbackTable:
        """The rows with their rewards, and what was passed over; see `read_feedback_table`."""
        return read_feedback_table(self.path)

    def write(self, lines: Sequence[str], *, timeout: float) -> None:
        """Append lines of JSON in one write, or none of them.

        Raises:
            OSError: If that fails, or the lock is not free within `timeout` seconds.
        """
        from filelock import FileLock  # not with the package: it takes its time

        data = b"".join(map(encoded, lines))
        # A lock of its own for every write: one made before a fork is refused in the child.
        with FileLock(f"{self.path}.lock").acquire(timeout=timeout, poll_interval=LOCK_POLL_SECONDS):
            size = self.path.stat().st_size if self.path.exists() else 0
            if size and size + len(data) > self.max_bytes:
                rotate(self.path, self.backups)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _append(descriptor, data)
            finally:
                os.close(descriptor)

    def __repr__(self) -> str:
        return f"FeedbackLog({str(self.path)!r})"


class LoggedRun(Sequence["Decision"]):
    """The decisions of one run, each appended to a log as it is made; `record_decisions(path)` yields it.

    As a sequence it is the latest decisions of the run, a thousand at most, so that a block may stay open as long as
    a server runs. Nothing here raises because the log cannot be written: the first failure, which may take a quarter of
    a second if somebody keeps the lock, is logged as a warning, and what cannot be written is dropped until writing
    works again.

    Attributes:
        log: The log written to.
        run: The run's key, which its rows carry.
    """

    def __init__(self, log: FeedbackLog, routes: Mapping[str, Any]) -> None:
        self.log = log
        self.run = uuid.uuid4().hex
        self._routes = routes
        self._kept: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self._made = 0
        self._calls: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def decisions(self) -> "list[Decision]":
        """The latest decisions, in the order they were made."""
        with self._lock:
            return list(self._kept)

    def reward(self, reward: Any, *, decision: str | None = None, cost: float | None = None) -> None:
        """Give the run its reward, during the block or any time after it.

        Args:
            reward: A number, a bool or a prediction with `score`. What is no finite number is kept as the rows'
                `error`.
            decision: The id of the one decision the reward is for; without it, it is for all of the run. In a block
                that serves many requests, reward each decision by its id.
            cost: Dollars the run's LM calls cost, if known.
        """
        if decision is None and not self._made:
            return
        with _dropped_on_failure(self.log.path):
            if decision is None:
                late = LateReward.of(reward, run=self.run, decisions=self._made, cost=cost)
            else:
                late = LateReward.of(reward, decision=decision, cost=cost)
            self.log.write([late.to_json()], timeout=_patience(self.log.path))

    def record(self, route: Any, decision: "Decision") -> None:
        """Append a decision that `route` has just made; one that it declined was not its own."""
        if decision.abstained:
            return
        with self._lock:
            calls = self._calls.setdefault(route, Counter())
            occurrence = calls[decision.field]
            calls[decision.field] += 1
            self._made += 1
            self._kept.append(decision)
        many = isinstance(decision.probabilities, Probabilities)
        every = many and len(decision.probabilities) == len(route.field(decision.field).options)
        with _dropped_on_failure(self.log.path):
            row = Feedback(
                source="log",
                example=text_key(decision.text),
                route=next((name for name, known in self._routes.items() if known is route), ""),
                field=decision.field,
                text=decision.text,
                candidates=() if every else tuple(decision.probabilities),
                chosen=decision.name,
                propensity=decision.propensity,
                reward=None,
                occurrence=occurrence,
                probabilities=likeliest(decision.probabilities, LOGGED) if many else dict(decision.probabilities),
                run=self.run,
                id=decision.id,
                encoder=route.encoder.fingerprint.weights[:16],
            )
            self.log.write([row.to_json()], timeout=_patience(self.log.path))

    @overload
    def __getitem__(self, index: int) -> "Decision": ...
    @overload
    def __getitem__(self, index: slice) -> "list[Decision]": ...
    def __getitem__(self, index: int | slice) -> "Decision | list[Decision]":
        return self.decisions[index]

    def __iter__(self) -> "Iterator[Decision]":
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"LoggedRun({self.run!r}, {len(self)} decisions, {self.log!r})"


def _append(descriptor: int, data: bytes) -> None:
    """Write all of `data` or nothing, on a line of its own even if the file ends in a cut one."""
    size = os.fstat(descriptor).st_size
    if size:
        os.lseek(descriptor, -1, os.SEEK_END)
        if os.read(descriptor, 1) != b"\n":
            data = b"\n" + data
    if os.write(descriptor, data) < len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _patience(path: Path) -> float:
    # A log that could not be written is not waited for again: one request has waited already.
    return 0.0 if path in _failing else REQUEST_LOCK_SECONDS


@contextmanager
def _dropped_on_failure(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside the block is a warning, logged once until it goes right again."""
    try:
        yield
    except Exception as error:
        if path not in _failing:
            _failing.add(path)
            logger.warning(
                "%s cannot be written (%s: %s). Decisions and rewards are dropped until it can be.",
                path, type(error).__name__, error,
            )  # fmt: skip
    else:
        _failing.discard(path)
