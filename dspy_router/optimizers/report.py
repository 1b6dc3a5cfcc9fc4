"""What a compile did, as an object that renders."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class FinetuneReport:
    """What `RouteFinetune.compile` learned from, what it spent and what came of it.

    Attributes:
        rows: Feedback rows by source.
        set_aside: What could not be learned from, by reason.
        train_before: Share of the training decisions about which something is known that the student got right.
        train_after: The same for the program returned.
        validation_before: Mean metric (or, without a metric, share of labels matched) of the student on the
            validation set; None without one.
        validation_after: The same for the program returned.
        validation_candidate: The same for the trained heads, kept or not.
        kept: `"trained"`, or `"student"` if training did not help and the student's weights stayed.
        reason: Why, in a sentence.
        rollouts: Program runs scored by the metric, validation included.
        errors: Those that raised.
        tokens: Tokens their LM calls took.
        cost: Their price in dollars; None if a model has no known price, so that only tokens are counted.
        seconds: Wall time of the compile.
        seed: The seed it can be repeated with.
    """

    rows: Mapping[str, int]
    set_aside: Mapping[str, int]
    train_before: float
    train_after: float
    validation_before: float | None
    validation_after: float | None
    validation_candidate: float | None
    kept: str
    reason: str
    rollouts: int
    errors: int
    tokens: int
    cost: float | None
    seconds: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values."""
        return asdict(self)

    def _table(self, form: str) -> str:
        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.3f}"

        cost = f"{self.tokens:,} tokens, " + ("price unknown" if self.cost is None else f"${self.cost:.4f}")
        lines = [
            ["learned from", ", ".join(f"{count:,} {source} rows" for source, count in self.rows.items()), ""],
            ["training decisions right, before and after", share(self.train_before), share(self.train_after)],
            ["kept", self.kept, self.reason],
            ["rollouts", f"{self.rollouts:,} ({self.errors} raised)", cost],
            ["time", f"{self.seconds:.1f} s", f"seed {self.seed}"],
        ]
        if self.validation_before is not None:
            validation = ["validation score, before and after", share(self.validation_before)]
            lines.insert(2, [*validation, share(self.validation_after)])
        if self.set_aside:
            aside = ", ".join(f"{count:,} {reason}" for reason, count in self.set_aside.items())
            lines.insert(1, ["set aside", aside, ""])
        return tabulate(lines, tablefmt=form, disable_numparse=True)

    def __str__(self) -> str:
        return self._table("plain")

    def _repr_html_(self) -> str:
        return self._table("html")
