"""Running a program with chosen decisions and scoring it by the metric."""

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dspy
from dspy.utils.parallelizer import ParallelExecutor
from dspy.utils.usage_tracker import track_usage

from dspy_router.costs import usage_cost
from dspy_router.decisions import Decision, choosing, recording
from dspy_router.errors import RouteError
from dspy_router.optimizers.rollout_log import RolloutLog
from dspy_router.route import DifferentiableRoute

Metric = Callable[..., Any]


@dataclass(frozen=True, order=True)
class Site:
    """Where in a run a decision is made: the route's name in the program, the field, and which call it is."""

    route: str
    field: str
    occurrence: int


@dataclass(frozen=True)
class SiteDecision:
    """A decision made in a rollout: the site, what was read, what was chosen and how."""

    site: Site
    text: str
    chosen: str
    propensity: float


@dataclass(frozen=True)
class Rollout:
    """One run of the program on one example, scored.

    Attributes:
        example: Key of the example.
        forced: The options that were forced, by site; decisions elsewhere were the policy's own.
        decisions: All decisions of the run, in order.
        reward: The metric's number, or `failure_score` if the run or the metric failed.
        error: What was raised, if anything.
        tokens: Tokens the run's LM calls took, prompt and completion together.
        cost: Their price in dollars; None if a model has no known price.
    """

    example: str
    forced: tuple[tuple[Site, str], ...]
    decisions: tuple[SiteDecision, ...]
    reward: float
    error: str | None = None
    tokens: int = 0
    cost: float | None = 0.0

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Rollout":
        """Read what `to_json` wrote."""
        entry = json.loads(line)
        entry["forced"] = tuple((Site(**site), option) for site, option in entry["forced"])
        entry["decisions"] = tuple(
            SiteDecision(**{**decision, "site": Site(**decision["site"])}) for decision in entry["decisions"]
        )
        return cls(**entry)


@dataclass(frozen=True)
class KeyedExample:
    """An example and the key that stands for it in feedback and logs."""

    key: str
    example: dspy.Example


@dataclass(frozen=True)
class Job:
    """A rollout to run: the example's index and the options to force."""

    example: int
    forced: tuple[tuple[Site, str], ...] = ()


class RolloutRunner:
    """Runs jobs in DSPy's worker threads and keeps what each one taught.

    A finished rollout that the log already holds is taken from there and not run again.

    Args:
        routes: The program's routes by name.
        metric: The program's metric, or None to observe decisions without scoring.
        num_threads: As in `dspy.Evaluate`.
        failure_score: The reward of a rollout that raised.
        max_errors: After so many rollouts that raised, running stops with an error.
        log: Where finished rollouts are kept; None keeps none.
    """

    def __init__(
        self,
        program: dspy.Module,
        routes: Mapping[str, DifferentiableRoute],
        metric: Metric | None,
        *,
        num_threads: int | None,
        failure_score: float,
        max_errors: int | None,
        log: RolloutLog | None = None,
    ) -> None:
        self.program = program
        self.metric = metric
        self.num_threads = num_threads
        self.failure_score = failure_score
        self.max_errors = dspy.settings.max_errors if max_errors is None else max_errors
        self.log = log
        self.finished: list[Rollout] = []
        self._names = {id(route): name for name, route in routes.items()}
        self._options = {
            (name, field.name): field.option_names for name, route in routes.items() for field in route.fields
        }
        self._errors: list[str] = []
        self._lock = threading.Lock()

    def run(
        self,
        jobs: Sequence[Job],
        examples: Sequence[KeyedExample],
        *,
        phase: str,
        on_done: Callable[[Rollout], object] | None = None,
    ) -> list[Rollout]:
        """Run jobs on examples; results are in the jobs' order.

        Raises:
            RouteError: When `max_errors` rollouts have raised; what was finished stays in `finished` and the log.
        """

        def one(job: Job) -> Rollout | None:
            if len(self._errors) >= self.max_errors:
                return None
            rollout = self._logged_or_run(job, examples[job.example], phase)
            with self._lock:
                self.finished.append(rollout)
                if rollout.error is not None:
                    self._errors.append(rollout.error)
            if on_done is not None:
                on_done(rollout)
            return rollout

        # No timeout: DSPy would run a slow rollout a second time and pay twice.
        executor = ParallelExecutor(
            num_threads=self.num_threads, max_errors=len(jobs) + 1, disable_progress_bar=True, timeout=0
        )
        results = executor.execute(one, list(jobs))
        if len(self._errors) >= self.max_errors:
            kept = f" What was paid for is kept in {self.log.path}." if self.log else ""
            raise RouteError(
                f"Stopped after {len(self._errors)} rollouts that raised (max_errors={self.max_errors}); the last: "
                f"{self._errors[-1]}.{kept}"
            )
        return results

    def _logged_or_run(self, job: Job, keyed: KeyedExample, phase: str) -> Rollout:
        key, example = keyed.key, keyed.example
        if self.log is not None and (logged := self.log.find(phase, key, _plain(job.forced))) is not None:
            return Rollout.from_json(logged)
        rollout = self._run(job, example, key)
        if self.log is not None:
            self.log.append(phase, key, _plain(job.forced), rollout.to_json())
        return rollout

    def _run(self, job: Job, example: dspy.Example, key: str) -> Rollout:
        run = _Run(self._names, self._options, dict(job.forced))
        reward, error = self.failure_score, None
        with track_usage() as usage, recording(run), choosing(run), dspy.context(trace=[]):
            try:
                prediction = self.program(**example.inputs())
                if self.metric is not None:
                    reward = reward_of(self.metric(example, prediction))
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        totals = usage.get_total_tokens()
        cost, tokens = usage_cost(totals) if totals else (0.0, 0)
        return Rollout(key, job.forced, tuple(run.decisions), reward, error, tokens, cost)


class _Run:
    """Chooser and recorder of one rollout."""

    def __init__(
        self,
        names: Mapping[int, str],
        options: Mapping[tuple[str, str], tuple[str, ...]],
        forced: Mapping[Site, str],
    ) -> None:
        self.decisions: list[SiteDecision] = []
        self._names = names
        self._options = options
        self._forced = forced
        self._calls: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def choose(self, route: Any, field: str, probabilities: Mapping[str, float]) -> tuple[int, float] | None:
        name = self._names.get(id(route))
        if name is None or not self._forced:
            return None
        option = self._forced.get(Site(name, field, self._calls.get((name, field), 0)))
        return None if option is None else (self._options[name, field].index(option), 1.0)

    def record(self, route: Any, decision: Decision) -> None:
        name = self._names.get(id(route))
        if name is None:
            return
        with self._lock:
            occurrence = self._calls.get((name, decision.field), 0)
            self._calls[name, decision.field] = occurrence + 1
            site = Site(name, decision.field, occurrence)
            self.decisions.append(SiteDecision(site, decision.text, decision.name, decision.propensity))


def reward_of(value: Any) -> float:
    """A metric's verdict as a number: a bool, a number, or a prediction with `score`.

    Raises:
        RouteError: If it is none of these, or not finite.

    Example:
        >>> reward_of(True), reward_of(dspy.Prediction(score=0.5))
        (1.0, 0.5)
    """
    try:
        reward = float(value.score if hasattr(value, "score") else value)
    except (TypeError, ValueError) as error:
        raise RouteError(
            f"The metric returned {value!r}; expected a bool, a number or a dspy.Prediction with score."
        ) from error
    if not math.isfinite(reward):
        raise RouteError(f"The metric returned {reward}, which is not finite. Return a number.")
    return reward


def keyed(examples: Sequence[dspy.Example]) -> list[KeyedExample]:
    """Examples with keys made from their content, the same in every process; equal examples are numbered."""
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        content = json.dumps(example.toDict(), sort_keys=True, default=str, ensure_ascii=False)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        seen[digest] += 1
        found.append(KeyedExample(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}", example))
    return found


def _plain(forced: tuple[tuple[Site, str], ...]) -> list[list[Any]]:
    return [[site.route, site.field, site.occurrence, option] for site, option in forced]
