"""What an audit has found so far, as an object that renders."""

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from dspy_router.learning.audit import DriftReport
from dspy_router.tables import table

ASSUMPTIONS = (
    "Whether a drawn decision comes to be judged does not depend on how good it was.",
    "Each judged call is a run of its own: a promise about runs with several calls is not audited call by call.",
    "A promise that holds is one that may be broken with probability delta: an alarm can also mean that.",
)
DRIFTED = (
    "They are no longer those that the promise was made for, or they come in bursts of one kind: among independent "
    "requests such an alarm is false with probability {alpha:g} at most."
)
OF_FALLBACK = "The fallback is right: where it is wrong, a right decision counts as a loss."


@dataclass(frozen=True)
class AuditReport:
    """The state of an audit.

    Attributes:
        field: The decisions audited.
        judge: What judges them: `"fallback"`, `"rewards"` or the name of a metric.
        risk: The most that they may lose on average.
        alpha: The chance of ever raising a false alarm.
        calls: Calls of the route while the audit was on.
        kept: Decisions that the guard kept, and nothing else made.
        drawn: Of them, those drawn to be judged.
        rows: Of them, those judged.
        waiting: Those whose reward may still come.
        failed: Those whose judge raised.
        loss: Mean loss of the judged; None before the first.
        wealth: That of the `RunningAudit`, the evidence against the promise; 1 / `alpha` is an alarm.
        alarmed: Whether there was one.
        stopped: Whether the audit has ended.
        drift: How the latest scores differ from those of the calibration rows; None before the first call, or if the
            guard has kept no scores.
        drifted: Whether a window of calls, tested so that `alpha` is the chance of ever finding any by mistake, was
            unlike the calibration rows.

    Example:
        >>> counts = {"calls": 900, "kept": 800, "drawn": 40, "rows": 40, "waiting": 0, "failed": 0}
        >>> found = {"loss": 0.025, "wealth": 1.1, "alarmed": False, "stopped": False, "drift": None, "drifted": False}
        >>> report = AuditReport(field="tool", judge="fallback", risk=0.02, alpha=0.05, **counts, **found)
        >>> print(report.sentence)
        Nothing says that decisions of 'tool' lose more than 0.02 on average: 40 judged lost 0.0250.
    """

    field: str
    judge: str
    risk: float
    alpha: float
    calls: int
    kept: int
    drawn: int
    rows: int
    waiting: int
    failed: int
    loss: float | None
    wealth: float
    alarmed: bool
    stopped: bool
    drift: DriftReport | None
    drifted: bool

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the alarm takes to be true."""
        return (OF_FALLBACK, *ASSUMPTIONS) if self.judge == "fallback" else ASSUMPTIONS

    @property
    def sentence(self) -> str:
        """Whether the promise still holds, as far as is known."""
        if self.loss is None:
            return f"Nothing is known yet of decisions of {self.field!r}: none has been judged."
        if self.alarmed:
            return (
                f"Decisions of {self.field!r} lose more than {self.risk:g} on average: {self.rows:,} judged lost "
                f"{self.loss:.4f}. Such an alarm is false with probability {self.alpha:g} at most. Look at the drift; "
                "then set the guard again with recent examples, or train the route on them."
            )
        return (
            f"Nothing says that decisions of {self.field!r} lose more than {self.risk:g} on average: {self.rows:,} "
            f"judged lost {self.loss:.4f}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return asdict(self)

    def _table(self, form: str) -> str:
        given_up = self.drawn - self.rows - self.waiting - self.failed
        lines = [
            ("calls", f"{self.calls:,}"),
            ("kept", f"{self.kept:,}"),
            ("drawn", f"{self.drawn:,}"),
            (f"judged ({self.judge})", f"{self.rows:,}"),
            ("waiting for a reward", f"{self.waiting:,}"),
            ("not judged", f"{self.failed + given_up:,} ({self.failed:,} failed)"),
            ("mean loss", "-" if self.loss is None else f"{self.loss:.4f} (at most {self.risk:g})"),
            ("wealth of the test", f"{self.wealth:.3g} (alarm at {1 / self.alpha:.3g})"),
        ]
        return table(lines, form=form)

    def _inputs(self) -> str:
        lines = ["Inputs: no scores to compare." if self.drift is None else str(self.drift)]
        lines += [DRIFTED.format(alpha=self.alpha)] if self.drifted else []
        return " ".join((*lines, "The audit has ended.") if self.stopped else lines)

    def __str__(self) -> str:
        assumed = "\n".join(("The alarm assumes:", *(f"- {line}" for line in self.assumptions)))
        return "\n\n".join((self.sentence, self._table("plain"), self._inputs(), assumed))

    def _repr_html_(self) -> str:
        assumed = "".join(f"<li>{escape(line)}</li>" for line in self.assumptions)
        return (
            f"<p><b>{escape(self.sentence)}</b></p>\n{self._table('html')}\n<p>{escape(self._inputs())}</p>\n"
            f"<p>The alarm assumes:</p><ul>{assumed}</ul>"
        )
