"""One compile of `RouteFinetune`, step by step: gather feedback, fit, guard, report."""

import copy
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy
from tqdm.auto import tqdm

from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback
from dspy_router.learning.fit import FitSettings
from dspy_router.optimizers.calibrating import calibrate_routes
from dspy_router.optimizers.exploration import explore
from dspy_router.optimizers.frontier import FrontierPoint, frontier
from dspy_router.optimizers.learner import (
    FieldRows,
    agreement,
    field_rows,
    fit_routes,
    learned_before,
    require_trainable,
)
from dspy_router.optimizers.logs import logged_feedback, with_example_keys
from dspy_router.optimizers.outcomes import TRIED, RewardReading
from dspy_router.optimizers.progress import Progress
from dspy_router.optimizers.replaying import replay
from dspy_router.optimizers.report import FinetuneReport
from dspy_router.optimizers.rollout_log import RolloutLog
from dspy_router.optimizers.rollouts import Job, KeyedExample, RolloutRunner, check_examples, keyed
from dspy_router.optimizers.runs import bind_clients, find_routes
from dspy_router.optimizers.settings import CostUnit, FinetuneSettings, metric_calls
from dspy_router.optimizers.sources import (
    has_labels,
    label_feedback,
    likely_texts,
    site_texts,
    teacher_feedback,
)
from dspy_router.optimizers.successes import Successes
from dspy_router.parameter import RouteParameter
from dspy_router.tracing import metrics_logs

Examples = list[KeyedExample]
SHARED_FITS = 4  # after so many the targets of a shared reward have settled
# While exploring, guesses should not be surer than the few successes behind them warrant.
EXPLORING = FitSettings(margin=1.0, tolerance=1e-2)


class Compilation:
    """The state of one compile; `run` returns the program and sets `report`.

    Raises:
        RouteError: If the program holds no route, or the examples are unusable.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        teacher: dspy.Module | None,
        valset: Sequence[dspy.Example] | None,
        feedback: Sequence[Feedback] | str | Path | None = None,
    ) -> None:
        self.settings = settings
        self.teacher = teacher
        self.logged = feedback
        if feedback is None or trainset:
            check_examples(trainset, "trainset")
        if valset:
            check_examples(valset, "valset")
        self.trainset, self.valset = keyed(trainset), keyed(valset or [])
        self.program = student.deepcopy()
        bind_clients(self.program)
        self.routes = find_routes(self.program)
        require_trainable(self.routes)
        self.anchors = {} if settings.restart else learned_before(self.routes)
        self.feedback: list[Feedback] = []
        self.set_aside: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.teacher_calls = 0
        self.reading = RewardReading(
            settings.best_reward, settings.cost_weight, settings.cost_unit, settings.metric_noise or 0.0
        )
        self.report: FinetuneReport | None = None
        self.progress = Progress(metrics_logs())
        self.runner = RolloutRunner(
            self.program,
            self.routes,
            settings.metric,
            num_threads=settings.num_threads,
            failure_score=settings.failure_score,
            max_errors=settings.max_errors,
            log=RolloutLog(settings.log_dir) if settings.log_dir else None,
            seed=settings.seed,
            executor=settings.executor,
        )

    def run(self) -> dspy.Module:
        """Gather, fit, guard; returns the program with the better of the student's and the trained heads."""
        started = time.perf_counter()
        self.budget(0)
        self.warm()
        student = {name: copy.deepcopy(route.learned) for name, route in self.routes.items()}
        for route in self.routes.values():
            route.learned.guard = None  # rollouts need decisions, and a promise is about the head it was made for
        validation_before = self.validate("validation of the student")
        self.progress.figure("validation_before", validation_before)
        self.gather()
        successes = Successes.among(self.feedback, self.reading)
        successes.warn()
        rows = self.fit()
        calibration = calibrate_routes(rows, self.settings.seed)
        train_after = agreement(rows)
        validation_after = self.validate("validation of the trained program")
        self.progress.figure("validation_candidate", validation_after)
        trained = {name: route.learned for name, route in self.routes.items()}
        self.use(student)
        train_before = agreement(self.rows())
        before, after, basis = train_before, train_after, "the training rows (no valset to check on)"
        if validation_before is not None and validation_after is not None:
            before, after, basis = validation_before, validation_after, f"{len(self.valset)} validation examples"
        # Rows flatter the heads that were fitted to them, and rewards for what the student decides already say nothing
        # new: what was learned before stays unless they show a gain.
        only_tried = all(row.source in TRIED for row in self.feedback)
        relearned = only_tried and all(entry.anchor is not None for entry in rows)
        gained = train_after > train_before if relearned else train_after >= train_before
        margin = 0.0
        if relearned and not self.valset:
            found = replay(self.routes, rows, self.feedback, self.reading, self.settings.seed)
            if found is not None:
                before, after, basis = found.student, found.trained, "runs made, decided by heads that did not see them"
                # As in the one-standard-error rule (Breiman et al., "Classification and Regression Trees", 1984).
                margin, gained = found.error, False
        # A draw on the validation set is broken by the training rows; without any there is nothing to keep.
        helped = bool(rows) and (after > before + margin or (after == before and gained))
        compared = "is worse than" if after < before else "is no worse than" if helped else "is no better than"
        if before < after <= before + margin:
            compared = "is within one standard error of"
        if helped:
            self.use(trained)
        frontier_points, cost_unit = self.frontier()
        self.report = FinetuneReport(
            rows=dict(Counter(row.source for row in self.feedback)),
            successes=successes,
            set_aside=dict(+self.set_aside),
            noted=dict(+self.noted),
            train_before=train_before if rows else None,
            train_after=(train_after if helped else train_before) if rows else None,
            validation_before=validation_before,
            validation_after=validation_after if helped else validation_before,
            validation_candidate=validation_after,
            kept="trained" if helped else "student",
            reason=f"{_told_apart(after, before)} {compared} {_told_apart(before, after)} on {basis}"
            if rows
            else "nothing was learned",
            seconds=time.perf_counter() - started,
            seed=self.settings.seed,
            noise=self.reading.noise,
            cost_unit=cost_unit,
            frontier=frontier_points,
            calibration=calibration if helped else (),
            **self.spent(),
        )
        if self.settings.log_dir is not None:
            report = json.dumps(self.report.to_dict(), indent=2)
            (self.settings.log_dir / "report.json").write_text(report + "\n", encoding="utf-8")
        self.progress.finish(self.report)
        return self.program

    def gather(self) -> None:
        """Fill `feedback` from the labels, then the teacher, then rollouts for what is still unsettled."""
        settings = self.settings
        labelled = has_labels(self.routes, self.trainset)
        if not labelled and self.teacher is None and settings.metric is None and self.logged is None:
            fields = sorted({field.name for route in self.routes.values() for field in route.fields})
            raise RouteError(
                "There is nothing to learn from: give RouteFinetune a metric, compile with a teacher or with logged "
                f"feedback, or put an output field ({', '.join(fields)}) into the examples."
            )
        self.feedback += self.labels(self.trainset)
        if self.logged is not None:
            logged = logged_feedback(self.logged, self.routes, self.reading)
            self.feedback += with_example_keys(logged.rows, self.routes, self.trainset)
            self.set_aside += logged.set_aside
            self.noted += logged.noted
        if self.teacher is not None:
            taught = teacher_feedback(
                self.teacher,
                self.program,
                self.routes,
                self.unsettled(),
                metric=settings.metric,
                metric_threshold=settings.metric_threshold,
                num_threads=settings.num_threads,
                max_errors=self.runner.max_errors,
            )
            self.feedback += taught.rows
            self.teacher_calls = taught.scored
            self.set_aside["teacher runs the metric refused"] += taught.refused
            self.set_aside["teacher runs that raised"] += taught.failed
            self.set_aside["teacher decisions for no option"] += taught.unknown
        if settings.metric is not None and (unsettled := self.unsettled()):
            self.explore(unsettled)

    def explore(self, examples: Examples) -> None:
        """Spend the budget on examples that nothing has settled yet."""
        known = len(self.feedback)
        budget = self.budget(len(examples))

        def fit(explored: list[Feedback], reading: RewardReading) -> None:
            self.feedback[known:], self.reading = explored, reading
            fit_routes(self.rows(), settings=EXPLORING, seed=self.settings.seed)

        if known:
            fit([], self.reading)
        with self.progress.phase("rollouts", budget, scored=True) as on_done:
            explored = explore(
                self.runner,
                self.routes,
                examples,
                known=self.feedback[:known],
                budget=budget,
                reading=self.reading,
                measure_noise=self.settings.metric_noise is None,
                seed=self.settings.seed,
                fit=fit,
                on_done=on_done,
            )
        self.feedback[known:], self.reading = explored.feedback, explored.reading
        self.set_aside["rollouts whose metric gave no number"] += sum(row.reward is None for row in explored.feedback)

    def budget(self, examples: int) -> int:
        """Rollouts there are for so many examples, the validation passes already taken off.

        Raises:
            RouteError: If the budget does not cover the validation passes.
        """
        decisions = sum(len(route.decision_fields) for route in self.routes.values())
        calls = metric_calls(self.settings, decisions, len(self.valset or self.trainset))
        passes = 2 * len(self.valset) if self.settings.metric else 0
        if calls is None:
            return 2 * examples
        if calls < passes:
            raise RouteError(
                f"max_metric_calls={calls} does not cover scoring the {len(self.valset)} validation examples before "
                f"and after ({passes} calls). Raise it, or give a smaller valset."
            )
        return max(0, calls - passes - self.teacher_calls)

    def validate(self, phase: str) -> float | None:
        """Mean score on the validation set: the metric's, or without a metric the share of labels matched."""
        if not self.valset:
            return None
        if self.settings.metric is None:
            rows = field_rows(self.routes, self.labels(self.valset))
            return agreement(rows) if rows else None
        with self.progress.phase(phase, len(self.valset), delay=2) as on_done:
            jobs = [Job(index) for index in range(len(self.valset))]
            rollouts = self.runner.run(jobs, self.valset, phase=phase, on_done=on_done)
        scores = [
            self.settings.failure_score if rollout.reward is None else self.reading.net(rollout) for rollout in rollouts
        ]
        return sum(scores) / len(scores)

    def warm(self) -> None:
        """Encode in batches the texts the routes will probably read, so that rollouts find them in the cache."""
        batches = partial(tqdm, desc="encoding", unit="batch", delay=2)
        for route in self.routes.values():
            texts = likely_texts(route, [*self.trainset, *self.valset])
            route.encoder.encode([text for text in texts if text is not None], progress=batches)

    def labels(self, examples: Examples) -> list[Feedback]:
        """A row for every gold label in the examples."""
        if not has_labels(self.routes, examples):
            return []
        texts = site_texts(self.program, self.routes, examples, self.settings.num_threads)
        return label_feedback(self.routes, examples, texts)

    def rows(self) -> list[FieldRows]:
        """The feedback so far as rows to fit."""
        return field_rows(self.routes, self.feedback, self.reading, self.anchors)

    def fit(self) -> list[FieldRows]:
        """Fit all heads to the feedback, and return the rows they were fitted to: none if no run was a success.

        What a shared reward says of each decision depends on the policy, so such rows are made and fitted anew a few
        times: expectation-maximisation.

        Raises:
            RouteError: If there is nothing to learn from.
        """
        validation = field_rows(self.routes, self.labels(self.valset))
        rows: list[FieldRows] = []
        for _ in range(1 if all(row.sole for row in self.feedback) else SHARED_FITS):
            rows = self.rows()
            if not rows:
                if any(row.source in TRIED and row.has_reward for row in self.feedback):
                    break
                if self.runner.finished and not self.feedback:
                    raise RouteError(
                        f"Nothing was learned: none of {len(self.runner.finished)} runs of the program reached a "
                        "decision of its routes. A run teaches a route only where the program calls it; the route of a "
                        "Shortlist is compiled by itself, on examples that name the needed tool."
                    )
                raise RouteError(
                    f"Nothing was learned: {len(self.feedback)} rows of feedback say nothing about any option (set "
                    f"aside: {dict(+self.set_aside)}). Give more of it."
                )
            fit_routes(rows, validation, seed=self.settings.seed)
        return rows

    def unsettled(self) -> Examples:
        """Training examples that have neither a right run nor a label or teacher's word for every field."""
        fields = {field.name for route in self.routes.values() for field in route.decision_fields}
        told: dict[str, set[str]] = defaultdict(set)
        for row in self.feedback:
            right = row.source in TRIED and row.has_reward and self.reading.success(row)
            told[row.example] |= fields if right else {row.field} if row.source not in TRIED else set()
        return [example for example in self.trainset if told[example.key] != fields]

    def frontier(self) -> tuple[tuple[FrontierPoint, ...], CostUnit]:
        """What could be earned at other weights of the cost, and the unit of that: tokens where a price is unknown."""
        tried = [row for row in self.feedback if row.source in TRIED and row.has_reward]
        unit = self.reading.cost_unit
        if unit == "dollars" and any(row.cost is None and row.tokens for row in tried):
            unit = "tokens"
        reading = replace(self.reading, cost_unit=unit)
        return frontier(self.routes, [row for row in tried if reading.knows_cost(row)], reading), unit

    def use(self, learned: dict[str, RouteParameter]) -> None:
        """Put other heads into the routes."""
        for name, route in self.routes.items():
            route.learned = learned[name]

    def spent(self) -> dict[str, Any]:
        """What the runs cost, as the report names it."""
        finished = self.runner.finished
        costs = [rollout.cost for rollout in finished]
        return {
            "rollouts": len(finished),
            "errors": sum(rollout.error is not None for rollout in finished),
            "lost": self.runner.lost,
            "tokens": sum(rollout.tokens for rollout in finished),
            "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
        }


def _told_apart(score: float, other: float) -> str:
    """A score as a report writes it beside another, with more digits where they would look the same.

    Example:
        >>> _told_apart(0.8, 0.8), _told_apart(0.99965, 0.9997)
        ('0.800', '0.999650')
    """
    return f"{score:.6f}" if score != other and f"{score:.3f}" == f"{other:.3f}" else f"{score:.3f}"
