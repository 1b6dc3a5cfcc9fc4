"""What a route promises, as an object that renders and is saved with the route."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np

from dspy_router.learning.risk import RiskThreshold
from dspy_router.tables import table

MOST_SCORES = 500  # of the calibration rows, that are kept and saved
ASSUMPTIONS = (
    "Calibration rows and future requests are independent draws of one distribution: no drift, no rows chosen by hand.",
    "The route was not trained on these rows, nor was any setting chosen on them.",
    "The route, the rest of the program, its LMs and the metric stay as they were.",
    "One guard from these rows; several, of which the best is taken, need a smaller delta each.",
    "The average is over all decisions kept; single requests, or kinds of requests, may lose more.",
)


@dataclass(frozen=True)
class GuardReport(RiskThreshold):
    """What `guard` found for one field of a route; the other attributes are those of `RiskThreshold`.

    Attributes:
        field: The output field whose decisions are guarded.
        metric: Name of the metric; a decision loses 1 minus its value.
        heads: Digest of the heads it speaks of; after a change of head or options there is no promise.
        fallback: Whether the route had a fallback for what it declines.
        texts: Calibration rows that differ in what the route read; None in reports saved before this was counted.
        scores: Of the calibration rows, rising: evenly spaced in rank if there were more than 500. An audit compares
            later ones with them.

    Example:
        >>> import numpy as np
        >>> from dspy_router.learning.risk import risk_threshold
        >>> scores = np.linspace(0, 1, 400)
        >>> found = risk_threshold(scores, (scores < 0.2).astype(float), risk=0.05, delta=0.05)
        >>> report = GuardReport.from_threshold(found, field="tool", metric="exact_match")
        >>> print(report.sentence)
        Decisions of 'tool' that score at least 0.1779 lose at most 0.05 on average (1 - exact_match), with probability
        at least 95 % over the draw of the calibration rows. Of those rows it declines the 17.8 % that are least sure.
        >>> GuardReport.from_dict(report.to_dict()) == report
        True
    """

    field: str
    metric: str
    heads: str = ""
    fallback: bool = False
    texts: int | None = None
    scores: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def from_threshold(
        cls,
        found: RiskThreshold,
        *,
        field: str,
        metric: str,
        heads: str = "",
        fallback: bool = False,
        texts: int | None = None,
        scores: Sequence[float] = (),
    ) -> "GuardReport":
        """The report of a threshold that was found for a field, with the scores of the calibration rows."""
        ranked = sorted(map(float, scores))
        ranks = np.linspace(0, len(ranked) - 1, min(len(ranked), MOST_SCORES)).round().astype(int)
        kept = tuple(ranked[rank] for rank in ranks)
        return cls(
            **asdict(found), field=field, metric=metric, heads=heads, fallback=fallback, texts=texts, scores=kept
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the promise takes to be true."""
        return (self.repetition, *ASSUMPTIONS) if self.repetition else ASSUMPTIONS

    @property
    def repetition(self) -> str:
        """What has to be true of calibration rows that repeat one another; empty if at least half of them differ."""
        if self.texts is None or 2 * self.texts >= self.rows:
            return ""
        return (
            f"The {self.rows:,} calibration rows hold {self.texts:,} different texts, repeated as future requests will "
            "repeat them: copies made to have more rows are no independent draws, and break the promise."
        )

    @property
    def sentence(self) -> str:
        """The promise, or why there is none."""
        if self.threshold is None:
            return (
                f"No threshold promises a risk of {self.risk:g}: every decision of {self.field!r} is declined. The "
                f"{self.start:,} calibration rows with the highest scores lost {self.start_loss:.4f} on average: too "
                "much, or on too few rows, for that promise. Give more calibration rows, allow a higher risk, or train "
                "the route further."
            )
        return (
            f"Decisions of {self.field!r} that score at least {self.threshold:.4g} lose at most {self.risk:g} on "
            f"average (1 - {self.metric}), with probability at least {100 * (1 - self.delta):g} % over the draw of the "
            f"calibration rows. {self._declined}"
        )

    @property
    def _declined(self) -> str:
        if self.kept == self.rows:
            return "Of those rows it declines none."
        return f"Of those rows it declines the {100 * (1 - self.coverage):.1f} % that are least sure."

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "GuardReport":
        """The report that `to_dict` described."""
        return cls(**{**state, "scores": tuple(state.get("scores", ()))})

    def _table(self, form: str) -> str:
        lines = [
            ("calibration rows", f"{self.rows:,}, {self.loss_kind} losses"),
            ("kept", f"{self.kept:,} (coverage {self.coverage:.1%})"),
        ]
        if self.loss is not None:
            lines += [("mean loss of the kept", f"{self.loss:.4f}"), ("upper bound", f"{self.bound:.4f}")]
        return table(lines, form=form)

    def __str__(self) -> str:
        assumed = "\n".join(("Assumes:", *(f"- {line}" for line in self.assumptions)))
        return "\n\n".join((self.sentence, self._table("plain"), assumed))

    def _repr_html_(self) -> str:
        assumed = "".join(f"<li>{escape(line)}</li>" for line in self.assumptions)
        return f"<p><b>{escape(self.sentence)}</b></p>\n{self._table('html')}\n<p>Assumes:</p><ul>{assumed}</ul>"
