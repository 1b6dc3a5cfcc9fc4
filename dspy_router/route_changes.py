"""What can be changed of a route without training it: its guard and the audit of that, its tools."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy

from dspy_router.options import Tools

if TYPE_CHECKING:
    from dspy_router.guarding.auditing import Audit
    from dspy_router.guarding.guard_report import GuardReport
    from dspy_router.guarding.judging import Judge
    from dspy_router.optimizers.settings import Metric


class RouteChanges:
    """Guard, audit and tools: a part of `DifferentiableRoute`; `self` is one."""

    _audit: "Audit | None" = None  # not copied and not saved

    def guard(
        self: Any,
        examples: Sequence[dspy.Example],
        *,
        metric: "Metric",
        risk: float = 0.02,
        delta: float = 0.05,
        program: dspy.Module | None = None,
        num_threads: int | None = None,
        seed: int = 0,
    ) -> "GuardReport":
        """Decline from now on what is too risky: set a threshold with a promise on the metric.

        The promise: with probability at least 1 - delta over the draw of the examples, the decisions that the route
        keeps lose at most `risk` on average, where a run loses 1 minus its metric. Method, proof and what breaks the
        promise stand in `dspy_router.learning.risk`. The guard is saved with the route, and lasts until the next one
        or the next training; after a change of the options it declines as before and promises nothing.

        What is declined goes to the route's `fallback`. Without one the outputs are None, and the program around the
        route has to do with that; `replace_predictor(program, "planner", ..., fallback=program.planner)` has the old
        planner answer instead.

        Args:
            examples: Calibration examples with inputs, drawn as future requests will be, that nothing was trained or
                chosen on. Some hundreds at least. If requests that were in training are dropped from such a draw, the
                promise is about requests that were not; rows copied to have more of them break it.
            metric: `metric(example, prediction)`, in [0, 1].
            risk: Most that kept decisions may lose on average, in (0, 1).
            delta: Probability with which that may fail, in (0, 1).
            program: The program that calls the route, if the metric is about its outcome; by default the route itself.
            num_threads: As in `dspy.Evaluate`.
            seed: Orders rows of equal score.

        Returns:
            What was found. Without a qualifying threshold the route declines everything.

        Raises:
            RouteError: If there are too few examples for the promise, the route was trained on some, or the metric is
                not in [0, 1] or needs more than the route's own prediction, without `program`.
        """
        from dspy_router.guarding.guard import set_guard

        return set_guard(
            self, examples, metric=metric, risk=risk, delta=delta, program=program, num_threads=num_threads, seed=seed
        )

    @property
    def promise(self: Any) -> "GuardReport | None":
        """What the guard promises; None without a guard, or after a change of the head or the options."""
        guard = self.learned.guard
        return guard if guard is not None and guard.heads == self.learned.digest else None

    def audit(
        self: Any,
        *,
        judge: "Judge" = "fallback",
        share: float = 0.05,
        alpha: float = 0.05,
        risk: float | None = None,
        resume: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> "Audit":
        """Have a share of the decisions that the guard keeps judged from now on; a warning says if it promised wrong.

        The arguments, what the warning means and what it takes stand at `dspy_router.guarding.auditing.Audit`, which is
        returned. An earlier audit of this route ends.

        Raises:
            RouteError: If the route promises nothing, there is nothing to judge by, or an argument is out of range.
        """
        from dspy_router.guarding.auditing import Audit

        audit = Audit(self, judge=judge, share=share, alpha=alpha, risk=risk, resume=resume, seed=seed)
        if self._audit is not None:
            self._audit.stop()
        self._audit = audit
        return audit

    def add_tools(self: Any, tools: Tools, field: str | None = None) -> None:
        """Let further tools be chosen from now on, known by their descriptions alone; nothing is trained.

        The others keep their order and their logits. A trained route has learned how a new option compares with those
        it has seen (`dspy_router.learning.new_options`), if it was trained on five or more; for a list, what a
        description's cosine is worth (`dspy_router.learning.list_calibration`). A guard's promise ends.
        Do not call it while the route is deciding in other threads.

        Args:
            tools: As for the class.
            field: Which field's; by default that of the only `str` or `list[str]` output.

        Raises:
            RouteError: If a tool is there already, or the signature itself lists the field's options.
        """
        from dspy_router.changing_tools import add_tools

        add_tools(self, tools, field)

    def remove_tools(self: Any, names: Collection[str], field: str | None = None) -> None:
        """Let some tools not be chosen any more, as `add_tools` lets others.

        Raises:
            RouteError: If a name is no tool, or fewer than two tools would be left (none, for a list).
        """
        from dspy_router.changing_tools import remove_tools

        remove_tools(self, names, field)
