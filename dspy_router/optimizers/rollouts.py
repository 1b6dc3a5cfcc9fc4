"""Running a program with chosen decisions and scoring it by the metric."""

import hashlib
import json
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dspy
from dspy.utils.usage_tracker import track_usage

from dspy_router.clients.decision_client import named_routes
from dspy_router.costs import usage_cost
from dspy_router.decisions import choosing, recording
from dspy_router.errors import RouteError
from dspy_router.optimizers.executors import Executor, LostExecutorError, ThreadExecutor
from dspy_router.optimizers.override import RunOverride, Site, SiteDecision, route_names
from dspy_router.optimizers.rollout_log import RolloutLog
from dspy_router.optimizers.settings import Metric, verdict
from dspy_router.route import DifferentiableRoute

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """One run of the program on one example, scored.

    Attributes:
        example: Key of the example.
        forced: The options that were forced, by site; decisions elsewhere were the policy's own.
        decisions: All decisions of the run, in order.
        reward: The metric's number, or `failure_score` if the run or the metric raised; None if the metric gave
            nothing that is a finite number, which is an error and teaches nothing.
        error: What was raised, if anything.
        tokens: Tokens the run's LM calls took, prompt and completion together.
        cost: Their price in dollars; None if a model has no known price.
    """

    example: str
    forced: tuple[tuple[Site, str], ...]
    decisions: tuple[SiteDecision, ...]
    reward: float | None
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
            SiteDecision(
                **decision | {"site": Site(**decision["site"]), "candidates": tuple(decision.get("candidates", ()))}
            )
            for decision in entry["decisions"]
        )
        return cls(**entry)


@dataclass(frozen=True)
class KeyedExample:
    """An example and the key that stands for it in feedback and logs."""

    key: str
    example: dspy.Example


@dataclass(frozen=True)
class Job:
    """A rollout to run.

    Attributes:
        example: The example's index.
        forced: The options to force, by site.
        look: Which run of the example this is, from 0.
        sampled: Whether decisions that are not forced are drawn at random, near the policy, with their propensities
            noted; else the policy's likeliest options are taken.
    """

    example: int
    forced: tuple[tuple[Site, str], ...] = ()
    look: int = 0
    sampled: bool = False


Task = tuple[Job, KeyedExample]


class ScoredProgram:
    """A program with its metric: runs jobs and scores them.

    It can be pickled where program and metric can.

    Args:
        routes: The program's routes by name.
        metric: The program's metric, or None to observe decisions without scoring.
        failure_score: The reward of a rollout that raised.
        seed: Of what sampled rollouts draw.
    """

    def __init__(
        self,
        program: dspy.Module,
        routes: Mapping[str, DifferentiableRoute],
        metric: Metric | None,
        *,
        failure_score: float,
        seed: int,
    ) -> None:
        self.program = program
        self.metric = metric
        self.failure_score = failure_score
        self.seed = seed
        self._names = route_names(routes)

    def run(self, job: Job, keyed: KeyedExample) -> Rollout:
        """One rollout; whatever the program raises is in it."""
        draws = random.Random(f"{self.seed} {keyed.key} {job.look}") if job.sampled else None
        run = RunOverride(self._names, job.forced, draws)
        reward: float | None = self.failure_score
        error = None
        with track_usage() as usage, recording(run), choosing(run), dspy.context(trace=[]):
            try:
                prediction = self.program(**keyed.example.inputs())
                if self.metric is not None:
                    reward = reward_of(verdict(self.metric, keyed.example, prediction))
            except RewardError as raised:
                reward, error = None, str(raised)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        totals = usage.get_total_tokens()
        cost, tokens = usage_cost(totals) if totals else (0.0, 0)
        return Rollout(keyed.key, job.forced, tuple(run.decisions), reward, error, tokens, cost)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_names"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._names = route_names(named_routes(self.program))  # these go by identity


class RolloutRunner:
    """Runs jobs where an executor takes them, and keeps what each one taught.

    A finished rollout that the log already holds is taken from there and not run again.

    Args:
        routes: The program's routes by name.
        metric: The program's metric, or None to observe decisions without scoring.
        num_threads: As in `dspy.Evaluate`.
        failure_score: The reward of a rollout that raised.
        max_errors: After so many rollouts that raised, running stops with an error.
        log: Where finished rollouts are kept; None keeps none.
        seed: Of what sampled rollouts draw.
        executor: Where rollouts run; in DSPy's threads by default.
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
        seed: int = 0,
        executor: Executor | None = None,
    ) -> None:
        self.program = program
        self.max_errors = dspy.settings.max_errors if max_errors is None else max_errors
        self.log = log
        self.finished: list[Rollout] = []
        self.lost = 0
        self._scored = ScoredProgram(program, routes, metric, failure_score=failure_score, seed=seed)
        self._threads = ThreadExecutor(num_threads)
        self._executor = executor or self._threads
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
            RouteError: When `max_errors` rollouts have raised, or the executor is lost and not to be replaced by
                threads; what was finished stays in `finished` and the log.
        """
        tasks = [(job, examples[job.example]) for job in jobs]
        found: dict[int, Rollout] = {}

        def keep(index: int, rollout: Rollout) -> bool:
            with self._lock:
                found[index] = rollout
                self.finished.append(rollout)
                if rollout.error is not None:
                    self._errors.append(rollout.error)
                going_on = len(self._errors) < self.max_errors
            if on_done is not None:
                on_done(rollout)
            return going_on

        def finish(index: int, rollout: Rollout) -> bool:
            if self.log is not None:
                job, keyed = tasks[index]
                self.log.append(phase, keyed.key, _plain(job), rollout.to_json())
            return keep(index, rollout)

        for index, rollout in self._logged(tasks, phase):
            keep(index, rollout)
        if len(self._errors) < self.max_errors:
            self._execute(tasks, found, finish)
        if len(self._errors) >= self.max_errors:
            raise RouteError(
                f"Stopped after {len(self._errors)} rollouts that raised (max_errors={self.max_errors}); the last: "
                f"{self._errors[-1].rstrip('.')}.{self._kept}"
            )
        return [found[index] for index in range(len(tasks))]

    def _logged(self, tasks: Sequence[Task], phase: str) -> Iterator[tuple[int, Rollout]]:
        for index, (job, keyed) in enumerate(tasks):
            if self.log is not None and (logged := self.log.find(phase, keyed.key, _plain(job))) is not None:
                yield index, Rollout.from_json(logged)

    def _execute(
        self, tasks: Sequence[Task], found: Mapping[int, Rollout], finish: Callable[[int, Rollout], bool]
    ) -> None:
        """Run the tasks for which nothing is found yet."""
        left = [index for index in range(len(tasks)) if index not in found]
        try:
            self.lost += self._executor.execute(
                self._scored, [tasks[index] for index in left], lambda place, rollout: finish(left[place], rollout)
            )
        except LostExecutorError as error:
            if not error.fall_back:
                raise RouteError(f"{error}{self._kept}") from error
            logger.warning("%s What is left runs in threads.", error)
            self.lost += error.lost
            self._executor = self._threads
            self._execute(tasks, found, finish)

    def close(self) -> None:
        """Give back what the executor holds."""
        self._executor.close()

    @property
    def _kept(self) -> str:
        return f" What was paid for is kept in {self.log.path}." if self.log else ""


class RewardError(RouteError):
    """The metric gave something that is no finite number."""


def reward_of(value: Any) -> float:
    """A metric's verdict as a number: a bool, a number, or a prediction with `score`.

    Raises:
        RewardError: If it is none of these, or not finite.

    Example:
        >>> reward_of(True), reward_of(dspy.Prediction(score=0.5))
        (1.0, 0.5)
    """
    try:
        reward = float(value.score if hasattr(value, "score") else value)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"The metric returned {value!r}; expected a bool, a number or a dspy.Prediction with score."
        ) from error
    if not math.isfinite(reward):
        raise RewardError(f"The metric returned {reward}, which is not finite. Return a number.")
    return reward


def check_examples(examples: Sequence[Any], name: str) -> None:
    """Refuse a set that is empty, or holds anything but examples with inputs.

    Raises:
        RouteError: Quoting what is wrong; `name` is what the caller calls the set.
    """
    if not examples:
        raise RouteError(f"There is nothing in the {name}: give at least one dspy.Example.")
    for example in examples:
        if not isinstance(example, dspy.Example) or example._input_keys is None:
            raise RouteError(
                f"An entry of the {name} is no dspy.Example with inputs: {str(example)[:80]}. "
                "Mark the inputs: dspy.Example(...).with_inputs('request')."
            )


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


def _plain(job: Job) -> list[Any]:
    """What is run, beside the example, as the log names it."""
    return [job.look, job.sampled, [[site.route, site.field, site.occurrence, option] for site, option in job.forced]]
