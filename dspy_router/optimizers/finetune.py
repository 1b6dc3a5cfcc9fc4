"""`RouteFinetune`: the optimizer that trains the routes of a program."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_router.errors import RouteError
from dspy_router.optimizers.settings import AutoBudget, CostUnit, FinetuneSettings, Metric, check_metric

if TYPE_CHECKING:
    from dspy_router.feedback import Feedback
    from dspy_router.optimizers.executors import Executor
    from dspy_router.optimizers.report import FinetuneReport


class RouteFinetune(Teleprompter):
    """Train every route of a program from labels, logs, a teacher's runs and the program's own metric.

    Rollouts are paid only for examples that neither a label, nor a log, nor the teacher settles.

    Args:
        metric: `metric(example, prediction)`, or with `trace` as third argument, returns a bool, a number or a
            `dspy.Prediction` with `score`. It scores rollouts, filters the teacher's runs and guards the result on the
            validation set.
        max_metric_calls: Most runs scored by the metric: rollouts, the teacher's, and the two passes over the
            validation set. By default twice the examples to explore, and those passes.
        auto: Instead of `max_metric_calls`, the number of calls `dspy.GEPA(auto=...)` allows itself for as many
            decisions and the same validation set (the training set if there is none).
        num_threads: As in `dspy.Evaluate`.
        metric_threshold: As in `dspy.BootstrapFewShot`: a teacher's run is kept from this score on; by
            default unless it scored zero.
        best_reward: The score at which a rollout needs no better.
        failure_score: The score of a rollout that raised.
        cost_weight: What a dollar of LM calls is worth in reward: routes learn to earn `reward - cost_weight · cost`.
        cost_unit: `"dollars"`, by litellm's prices, or `"tokens"`; `cost_weight` is per unit.
        metric_noise: Share of 0/1 rewards that are wrong, in [0, 0.5). By default a few rollouts (5 % of a small
            budget, 1 % of a large one) are made twice to measure it; where all agree, rewards are taken as they are.
        restart: Whether routes that were trained before forget it. By default they keep what they know as far as the
            new rows do not speak against it: a few rows change little, and old rows need not be given again.
        max_errors: Stop after so many rollouts that raised; DSPy's setting by default.
        seed: With the same seed and data, the same result.
        log_dir: Finished rollouts are kept in `rollouts.jsonl` there, and taken from it by a later compile with
            the same examples; the report goes to `report.json`. Use one folder for each metric and program.
        executor: Where rollouts run: DSPy's own threads by default, `dspy_router.distributed.RayExecutor` for the
            worker processes of a Ray cluster. Results are the same.

    Where MLflow or OpenTelemetry is in use, they are told of the progress; see `dspy_router.tracing`.

    After `compile`, `report` is a `FinetuneReport` and `feedback` the rows learned from; after a compile that
    stopped with an error, `feedback` holds what was gathered by then.

    Example:
        >>> import dspy, numpy as np
        >>> from dspy_router import DifferentiableRoute, RouteFinetune
        >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> kind", tools=["x", "y"], encoder=letters)
        >>> trainset = [
        ...     dspy.Example(text=text, kind=kind).with_inputs("text")
        ...     for text, kind in [("abba", "x"), ("baa", "x"), ("fig", "y"), ("jig", "y")]
        ... ]
        >>> trained = RouteFinetune().compile(route, trainset=trainset)
        >>> trained(text="babba").kind, trained(text="gif").kind
        ('x', 'y')
    """

    def __init__(
        self,
        metric: Metric | None = None,
        *,
        max_metric_calls: int | None = None,
        auto: AutoBudget | None = None,
        num_threads: int | None = None,
        metric_threshold: float | None = None,
        best_reward: float = 1.0,
        failure_score: float = 0.0,
        cost_weight: float = 0.0,
        cost_unit: CostUnit = "dollars",
        metric_noise: float | None = None,
        restart: bool = False,
        max_errors: int | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        executor: "Executor | None" = None,
    ) -> None:
        super().__init__()
        if metric is not None:
            check_metric(metric)
        if max_metric_calls is not None and max_metric_calls < 0:
            raise RouteError(f"max_metric_calls={max_metric_calls} is negative; give a number of rollouts.")
        if auto is not None and max_metric_calls is not None:
            raise RouteError(f"max_metric_calls={max_metric_calls} and auto={auto!r} are two budgets; give one.")
        if auto not in (None, *get_args(AutoBudget)):
            raise RouteError(f"auto={auto!r} is no budget; give 'light', 'medium' or 'heavy'.")
        if not 0 <= cost_weight < math.inf:
            raise RouteError(f"cost_weight={cost_weight} is no weight; give a reward per unit of cost, 0 or more.")
        if cost_unit not in get_args(CostUnit):
            raise RouteError(f"cost_unit={cost_unit!r} is no unit; give 'dollars' or 'tokens'.")
        if metric_noise is not None and not 0 <= metric_noise < 0.5:
            raise RouteError(f"metric_noise={metric_noise} is outside [0, 0.5): a share of wrong rewards.")
        self.settings = FinetuneSettings(
            metric=metric,
            max_metric_calls=max_metric_calls,
            auto=auto,
            num_threads=num_threads,
            metric_threshold=metric_threshold,
            best_reward=best_reward,
            failure_score=failure_score,
            cost_weight=cost_weight,
            cost_unit=cost_unit,
            metric_noise=metric_noise,
            restart=restart,
            max_errors=max_errors,
            seed=seed,
            log_dir=Path(log_dir) if log_dir else None,
            executor=executor,
        )
        self.report: FinetuneReport | None = None
        self.feedback: list[Feedback] = []

    def get_params(self) -> dict[str, Any]:
        """The settings, in a dict of its own: MLflow adds to it what `compile` was given."""
        return dict(vars(self.settings))

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example] | None = None,
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
        feedback: "Sequence[Feedback] | str | Path | None" = None,
    ) -> dspy.Module:
        """Return a copy of the student with trained routes; the student is left as it was.

        Args:
            student: A route, or any module with routes in it.
            trainset: Examples with inputs set. Those that have a route's output field are gold labels; of an output
                that is a list, a list, `[]` where no option fits. May be left out where there is feedback.
            teacher: A program whose decisions are learned, such as the one with the LM planner; or a list of one, as
                `dspy.BetterTogether` hands it over.
            valset: Examples on which the result must be no worse than the student. Without a valset the
                training rows stand in, which is a weaker check; the report says so. A student that was trained
                before and is taught by rewards alone then stays as it is unless the result is better on them.
            feedback: Rows logged earlier, or the path of a log (see `record_decisions`). Rows that do not fit the
                program's routes are counted in the report by reason.

        Raises:
            RouteError: If there is nothing to learn from, a label is no option, there are several teachers or
                another compile is using `log_dir`, or when `max_errors` rollouts have raised.
        """
        from dspy_router.optimizers.compilation import Compilation  # brings torch
        from dspy_router.optimizers.rollout_log import sole_use

        log_dir = self.settings.log_dir
        with sole_use(log_dir) if log_dir else nullcontext():
            compilation = Compilation(self.settings, student, trainset or [], _sole_teacher(teacher), valset, feedback)
            self.report, self.feedback = None, compilation.feedback
            try:
                program = compilation.run()
            finally:
                compilation.runner.close()
        self.report = compilation.report
        return program


def _sole_teacher(teacher: dspy.Module | Sequence[dspy.Module] | None) -> dspy.Module | None:
    if not isinstance(teacher, Sequence):
        return teacher
    if len(teacher) > 1:
        raise RouteError(f"{len(teacher)} teachers were given; give the one whose decisions are to be learned.")
    return teacher[0] if teacher else None
