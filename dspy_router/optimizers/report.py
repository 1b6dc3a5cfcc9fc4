"""What a compile did, as an object that renders."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from dspy_router.optimizers.calibrating import FieldCalibration
from dspy_router.optimizers.frontier import FrontierPoint
from dspy_router.optimizers.settings import CostUnit
from dspy_router.optimizers.successes import Successes
from dspy_router.tables import table


@dataclass(frozen=True)
class FinetuneReport:
    """What `RouteFinetune.compile` learned from, what it spent and what came of it.

    Attributes:
        rows: Feedback rows by source.
        successes: What the metric rewarded of what was tried, on how many examples nothing, and which options never.
        set_aside: What could not be learned from, by reason.
        noted: Logged rows that not every objective could use, by reason.
        train_before: How far the student agrees with the training rows: the share of decisions about which something is
            known where its option is among the likeliest. Some of that is inferred from failures, and all of it is
            what the heads were fitted to, so it is no estimate of accuracy. Where rewards are graded, what its choices
            are worth, from the least reward seen (0) to the greatest (1); what was not tried is estimated without bias,
            and estimates can lie outside. None if nothing was learned.
        train_after: The same for the program returned.
        validation_before: Mean metric (or, without a metric, share of labels matched) of the student on the
            validation set; None without one.
        validation_after: The same for the program returned.
        validation_candidate: The same for the trained heads, kept or not.
        kept: `"trained"`, or `"student"` if training did not help and the student's weights stayed.
        reason: Why, in a sentence.
        rollouts: Program runs scored by the metric, validation included.
        errors: Those that raised.
        lost: Runs beside these that were with a worker process when it died, each run again. What they had spent by
            then nobody knows, so it is in neither `tokens` nor `cost`.
        tokens: Tokens their LM calls took.
        cost: Their price in dollars; None if a model has no known price, so that only tokens are counted.
        noise: Share of 0/1 rewards found, or said, to be wrong.
        cost_unit: What the frontier counts as cost.
        frontier: What routes trained for other weights of the cost would earn and cost, cheapest last; empty if runs
            cost nothing.
        calibration: By field, what made the probabilities of the program returned say how often they are right.
        seconds: Wall time of the compile.
        seed: The seed it can be repeated with.
    """

    rows: Mapping[str, int]
    successes: Successes
    set_aside: Mapping[str, int]
    noted: Mapping[str, int]
    train_before: float | None
    train_after: float | None
    validation_before: float | None
    validation_after: float | None
    validation_candidate: float | None
    kept: str
    reason: str
    rollouts: int
    errors: int
    lost: int
    tokens: int
    cost: float | None
    noise: float
    cost_unit: CostUnit
    frontier: tuple[FrontierPoint, ...]
    calibration: tuple[FieldCalibration, ...]
    seconds: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        calibration = [found.to_dict() for found in self.calibration]
        return {**asdict(replace(self, calibration=())), "calibration": calibration}

    def _table(self, form: str) -> str:
        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.3f}"

        cost = f"{self.tokens:,} tokens, " + ("price unknown" if self.cost is None else f"${self.cost:.4f}")
        lost = f", {self.lost} lost with their worker and run again" if self.lost else ""
        lines = [
            ["learned from", ", ".join(f"{count:,} {source} rows" for source, count in self.rows.items()), ""],
            ["kept", self.kept, self.reason],
            ["rollouts", f"{self.rollouts:,} ({self.errors} raised{lost})", cost],
            ["time", f"{self.seconds:.1f} s", f"seed {self.seed}"],
        ]
        for name, before, after in (
            ("validation score", self.validation_before, self.validation_after),
            ("agrees with the training rows", self.train_before, self.train_after),
        ):
            if before is not None:
                lines.insert(1, [f"{name}, before and after", share(before), share(after)])
        found = self.successes
        if found.never_rewarded and not found.alarm:
            lines.insert(1, ["options never rewarded", found.unrewarded, "is the metric right about them?"])
        if found.failed_examples and not found.graded:
            lines.insert(
                1, ["examples on which nothing succeeded", f"{found.failed_examples:,} of {found.examples:,}", ""]
            )
        for name, counts in (("used in part", self.noted), ("set aside", self.set_aside)):
            if counts:
                lines.insert(1, [name, ", ".join(f"{count:,} {reason}" for reason, count in counts.items()), ""])
        for fitted in self.calibration:
            raw, calibrated = fitted.before, fitted.after
            error = f"expected error {raw.error:.3f} before, {calibrated.error:.3f} after"
            loss = f"log loss {raw.log_loss:.3f} before, {calibrated.log_loss:.3f} after"
            score = f"Brier score {raw.brier_score:.3f} before, {calibrated.brier_score:.3f} after"
            lines.insert(-2, [f"calibration of {fitted.field!r}", error, fitted.basis])
            lines.insert(-2, [f"scores of {fitted.field!r}, the lower the better", loss, score])
            if fitted.recall:
                shares = ", ".join(f"{share:.3f} among {k}" for k, share in fitted.recall.items())
                lines.insert(-2, [f"right {fitted.field!r} among the likeliest", shares, "recall@k of the same rows"])
        if self.noise:
            lines.insert(-1, ["noise of the metric", f"{self.noise:.1%} of its rewards are wrong", ""])
        return table(lines, form=form)

    def _frontier_table(self, form: str) -> str:
        headers = ["cost weight", "reward a run", f"{self.cost_unit} a run"]
        rows = [[f"{point.cost_weight:.4g}", f"{point.reward:.3f}", f"{point.cost:.4g}"] for point in self.frontier]
        return table(rows, headers=headers, form=form)

    def save_frontier(self, path: str | Path) -> Path:
        """Draw the frontier; see `dspy_router.evaluation.plots.save_frontier`."""
        from dspy_router.evaluation.plots import save_frontier

        return save_frontier(self.frontier, path, cost_unit=self.cost_unit)

    def __str__(self) -> str:
        frontier = f"\n\n{self._frontier_table('plain')}" if self.frontier else ""
        alarm = f"{self.successes.alarm}\n\n" if self.successes.alarm else ""
        return alarm + self._table("plain") + frontier

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self.successes.alarm)}</p>"] if self.successes.alarm else []
        parts.append(self._table("html"))
        if self.calibration:
            parts.append(self._reliability())
        if self.frontier:
            parts += [self._frontier_table("html"), self._picture_of_frontier()]
        return "".join(parts)

    def _reliability(self) -> str:
        try:
            from dspy_router.evaluation.plots import reliability_svg

            tables = {
                f"{found.field}, {state}": table
                for found in self.calibration
                for state, table in (("as fitted", found.before), ("calibrated", found.after))
            }
            return reliability_svg(tables)
        except ImportError:  # the extra `plots` is not installed
            return "".join(
                f"<p>Reliability of {escape(repr(found.field))}:</p>{found.after._repr_html_()}"
                for found in self.calibration
            )

    def _picture_of_frontier(self) -> str:
        try:
            from dspy_router.evaluation.plots import frontier_svg

            return frontier_svg(self.frontier, cost_unit=self.cost_unit)
        except ImportError:  # the extra `plots` is not installed
            return ""
