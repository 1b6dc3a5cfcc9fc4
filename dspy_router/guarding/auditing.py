"""Auditing a guarded route in production: a share of what it keeps is judged, and a running test watches the promise.

The statistics are those of `dspy_router.learning.audit`; here is which decisions are judged, by what, and when.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from dspy_router.deciding import Call, Policies
from dspy_router.errors import RouteError
from dspy_router.guarding.audit_report import AuditReport
from dspy_router.guarding.judging import FALLBACK, REWARDS, Judge, check_judge, judge_name, judged_loss, loss_of
from dspy_router.learning.audit import RunningAudit, RunningDrift

if TYPE_CHECKING:
    from dspy_router.route import DifferentiableRoute

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000  # drawn calls whose reward is waited for; the oldest are given up


class Audit:
    """The audit of a guarded route; `route.audit(...)` starts it, and it goes on until `stop`, or another one.

    It belongs to the route object and sees its calls from all threads and tasks. A copy of the route has none,
    pickled ones included. It changes no decision and no output.

    A call that the guard keeps is drawn with probability `share`, whatever is decided. What is drawn is judged by

    - `"fallback"`: the route's fallback answers the same inputs, and where a field differs, the decision loses 1. This
      counts the fallback's own errors too: if it is wrong in 3 % of the requests, give a `risk` 3 % above the promise.
    - a metric, `metric(example, prediction)` in [0, 1], whose example has the inputs and no label: a judge.
    - `"rewards"`: what is told later by `observe`. An alarm can be trusted if the rewards of drawn calls come whether
      they are good or bad; where only some users answer, ask for the reward of those that `waits_for` names.

    The fallback or the metric runs before the call returns (in async code in a thread, so that the event loop is free):
    a drawn call takes as long, and costs as much, as one that is declined. If it raises, the call is not judged, which
    the report counts. Calls in which something else decides (`explore_decisions`, `force_decisions`) are not judged.

    The losses feed one `RunningAudit`, which logs a warning, once, when they refute the promise: a false one, ever,
    with probability `alpha` at most. Twice a promised 5 % is seen after 170 losses in the median: 3,400 kept calls at a
    share of 5 %. Another warning, once, and false with the same probability at most, says that the requests are no
    longer like the calibration examples: it needs no judge, and all calls count, declined ones too (`RunningDrift`).
    Several processes have an audit each; divide `alpha` by their number. The promise is about a run of the program that
    was calibrated, and the audit takes each call for one run.

    Args:
        route: The guarded route; `route.audit` passes itself.
        judge: `"fallback"`, `"rewards"` or a metric.
        share: Of kept calls, how many are drawn, in (0, 1].
        alpha: The chance of a false alarm, in (0, 1).
        risk: The most that kept decisions may lose on average; by default as promised.
        resume: What `to_dict` gave, with which the audit goes on.
        seed: Makes the draws repeatable.

    Attributes:
        guard: The promise that is audited. When the route no longer makes it, the audit ends.
        share: Of kept calls, how many are judged.
        stopped: Whether it has ended.

    Raises:
        RouteError: As `route.audit` says.

    Example:
        >>> import dspy, numpy as np
        >>> from dspy_router import DifferentiableRoute
        >>> letters = lambda texts: np.array([[text.count(c) + 0.01 for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
        >>> asked = [dspy.Example(text=f"a fig {number}", fruit="fig").with_inputs("text") for number in range(400)]
        >>> promise = route.guard(asked, metric=lambda example, prediction: prediction.fruit == "fig", risk=0.05)
        >>> audit = route.audit(judge="rewards", share=1.0)
        >>> for number in range(100):
        ...     prediction = route(text=f"a fig {number}")
        ...     used = audit.observe(prediction.decision.id, 1.0)
        >>> audit.report.rows, audit.report.loss, audit.alarmed
        (100, 0.0, False)
    """

    def __init__(
        self,
        route: "DifferentiableRoute",
        *,
        judge: Judge = FALLBACK,
        share: float = 0.05,
        alpha: float = 0.05,
        risk: float | None = None,
        resume: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise RouteError(f"share={share!r} is no share of decisions to judge: give a number above 0 and up to 1.")
        check_judge(route, judge)
        promise = route.promise
        if promise is None or promise.threshold is None:
            raise RouteError(
                f"{route!r} promises nothing that could be audited: "
                + ("its guard declines everything. " if promise else "it has no guard, or has changed since. ")
                + "Call route.guard(...) first."
            )
        self.guard = promise
        self.share = share
        self.stopped = False
        self._judge = judge
        self._test = RunningAudit(promise.risk if risk is None else risk, alpha)
        self._calls = self._kept = self._drawn = self._failed = 0
        self._inputs = RunningDrift(np.array(promise.scores), alpha) if promise.scores else None
        self._waiting: dict[str, tuple[str, ...]] = {}  # from a decision's id to those of its call, oldest first
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        if resume is not None:
            self._resume(resume)

    @property
    def alarmed(self) -> bool:
        """Whether the promise has been refuted."""
        return self._test.alarmed

    @property
    def report(self) -> AuditReport:
        """The state of the audit.

        The p-value of the drift is that of one look at the latest 500 calls, declined ones included; `drifted` is what
        has come of many.
        """
        with self._lock:
            test, inputs = self._test, self._inputs
            return AuditReport(
                field=self.guard.field,
                judge=judge_name(self._judge),
                risk=test.risk,
                alpha=test.alpha,
                calls=self._calls,
                kept=self._kept,
                drawn=self._drawn,
                rows=test.rows,
                waiting=len(set(self._waiting.values())),
                failed=self._failed,
                loss=test.mean,
                wealth=test.wealth,
                alarmed=test.alarmed,
                stopped=self.stopped,
                drift=inputs.report if inputs is not None else None,
                drifted=inputs is not None and inputs.alarmed,
            )

    def waits_for(self, decision_id: str) -> bool:
        """Whether a decision was drawn and has no reward yet."""
        return decision_id in self._waiting

    def observe(self, decision_id: str, reward: Any) -> bool:
        """Tell the reward of a decision; of those that were not drawn it is ignored.

        Args:
            decision_id: The decision's `id`. Of a call that decides several fields any one will do, once.
            reward: In [0, 1]: a number, a bool or a prediction with `score`; for the promise, the guard's metric.

        Returns:
            Whether it was used.

        Raises:
            RouteError: If the reward is not in [0, 1], or something else judges.
        """
        if self._judge != REWARDS:
            raise RouteError(f"This audit is judged by {self._judge!r}. Start it with judge={REWARDS!r}.")
        loss = loss_of(reward)
        with self._lock:
            ids = self._waiting.get(decision_id)
            for known in ids or ():
                del self._waiting[known]
        if ids is not None:
            self._take(loss)
        return ids is not None

    def stop(self) -> None:
        """End the audit; rewards of what was drawn are still taken."""
        self.stopped = True

    def draws(self, route: "DifferentiableRoute", thought: Policies) -> bool:
        """Take note of a call of the route; True if `check` is to follow when it is decided."""
        if self.stopped or thought.score is None or dspy.settings.get("_route_scoring", False):
            return False
        own = not thought.declined and dspy.settings.get("_route_chooser", None) is None
        drawn = own and self._random.random() < self.share
        # Whether the head has changed takes longer to find out than the rest, so it is asked of drawn calls alone.
        if (route.promise if drawn else route.learned.guard) != self.guard:
            self.stop()
            logger.warning("%r no longer makes the promise that was audited: the audit ends. Start a new one.", route)
            return False
        with self._lock:
            self._calls += 1
            self._kept += own
            self._drawn += drawn
            inputs = self._inputs
            known = inputs is None or inputs.alarmed
            drifted = inputs is not None and inputs.observe(thought.score)
        if drifted and not known:
            logger.warning(
                "The requests of %r are no longer those its guard was set with. %s Set the guard again with recent "
                "examples, and look at what the route declines.", route, self.report.drift,
            )  # fmt: skip
        return drawn

    def check(self, route: "DifferentiableRoute", call: Call, prediction: dspy.Prediction) -> None:
        """Have a drawn call judged, or wait for its reward; never raises."""
        if self._judge == REWARDS:
            self._wait(tuple(decision.id for decision in prediction.decisions.values()))
            return
        try:
            loss = judged_loss(self._judge, route, call, prediction)
        except Exception as error:
            self._failed_with(error)
        else:
            self._take(loss)

    async def acheck(self, route: "DifferentiableRoute", call: Call, prediction: dspy.Prediction) -> None:
        """`check` for async code: a judge that takes time runs in a thread."""
        if self._judge == REWARDS:
            self.check(route, call, prediction)
        else:
            await asyncio.to_thread(self.check, route, call, prediction)

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-compatible values, with which `route.audit(resume=...)` goes on after a restart."""
        with self._lock:
            return {
                "promise": [self.guard.heads, self.guard.threshold],
                "counts": [self._calls, self._kept, self._drawn, self._failed],
                "inputs": None if self._inputs is None else self._inputs.to_dict(),
                "waiting": [list(ids) for ids in dict.fromkeys(self._waiting.values())],
                "test": self._test.to_dict(),
            }

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # copied or pickled with its route, it is None

    def __repr__(self) -> str:
        return f"Audit({self.report.sentence!r})"

    def _take(self, loss: float) -> None:
        with self._lock:
            before = self._test.alarmed
            alarm = self._test.observe(loss) and not before
        if alarm:
            logger.warning("The promise of a guard no longer holds. %s", self.report.sentence)

    def _wait(self, ids: tuple[str, ...]) -> None:
        with self._lock:
            self._waiting.update(dict.fromkeys(ids, ids))
            while len(self._waiting) > MOST_WAITING * len(ids):
                for oldest in self._waiting[next(iter(self._waiting))]:
                    del self._waiting[oldest]

    def _failed_with(self, error: Exception) -> None:
        with self._lock:
            self._failed += 1
            first = self._failed == 1
        if first:
            logger.warning(
                "A call could not be judged (%s: %s). It is left out; further ones are counted in the audit's report.",
                type(error).__name__, error,
            )  # fmt: skip

    def _resume(self, state: Mapping[str, Any]) -> None:
        try:
            promise, test = state["promise"], RunningAudit.from_dict(state["test"])
            self._calls, self._kept, self._drawn, self._failed = (int(count) for count in state["counts"])
            if state["inputs"] is not None:
                self._inputs = RunningDrift.from_dict(state["inputs"], np.array(self.guard.scores))
            for ids in state["waiting"]:
                self._wait(tuple(map(str, ids)))
            if not (test.wealth >= 0 and 0 <= (test.mean or 0.0) <= 1):
                raise ValueError(f"wealth {test.wealth}, mean loss {test.mean}")
        except (KeyError, TypeError, ValueError) as error:
            raise RouteError(f"The saved audit cannot be read ({error!r}). Start without resume.") from error
        if promise != [self.guard.heads, self.guard.threshold]:
            raise RouteError("The saved audit is that of another promise. Start without resume.")
        if (test.risk, test.alpha) != (self._test.risk, self._test.alpha):
            raise RouteError(
                f"risk={self._test.risk!r}, alpha={self._test.alpha!r}: the saved audit has {test.risk!r} and "
                f"{test.alpha!r}, which must stay. Start without resume, or give these."
            )
        self._test = test
