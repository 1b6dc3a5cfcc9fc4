"""How far a compile is: shown by a progress bar, logged as metrics."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm.auto import tqdm

from dspy_router.optimizers.report import FinetuneReport
from dspy_router.optimizers.rollouts import Rollout
from dspy_router.tracing import COUNTERS, MetricsLog, warn_once

POINTS = 100  # most points on the curve of a phase
FINAL = ("validation_after", "train_before", "train_after")  # figures of the report that are known at its end


@dataclass
class Tally:
    """Totals over rollouts.

    Attributes:
        rollouts: How many.
        errors: Those that raised.
        reward: The sum of their rewards.
        tokens: Tokens their LM calls took.
        cost: Their price in dollars; None once a price is unknown.
    """

    rollouts: int = 0
    errors: int = 0
    reward: float = 0.0
    tokens: int = 0
    cost: float | None = 0.0

    def add(self, rollout: Rollout) -> None:
        """Count a rollout in."""
        self.rollouts += 1
        self.errors += rollout.error is not None
        self.reward += rollout.reward or 0.0
        self.tokens += rollout.tokens
        self.cost = None if self.cost is None or rollout.cost is None else self.cost + rollout.cost

    def totals(self) -> dict[str, float]:
        """The totals that are metrics, as far as they are known."""
        totals = {name: getattr(self, name) for name in COUNTERS}
        return {name: total for name, total in totals.items() if total is not None}

    @property
    def score(self) -> float:
        """The mean reward."""
        return self.reward / self.rollouts

    @property
    def spent(self) -> dict[str, str]:
        """What the bar says of the cost: dollars, tokens where a price is unknown, nothing where nothing was spent."""
        if self.cost:
            return {"cost": f"${self.cost:.4f}"}
        return {"tokens": str(self.tokens)} if self.tokens else {}


class Progress:
    """The progress of one compile; worker threads tell it of their rollouts.

    Args:
        logs: Where metrics go. One that fails is not used again.
    """

    def __init__(self, logs: Sequence[MetricsLog] = ()) -> None:
        self._logs = list(logs)
        self._total = Tally()
        self._lock = threading.Lock()

    @contextmanager
    def phase(
        self, name: str, runs: int, *, scored: bool = False, delay: float = 0
    ) -> Iterator[Callable[[Rollout], None]]:
        """Show a bar for up to so many rollouts; what is yielded is to be called with each that is done.

        Args:
            name: What the bar says.
            runs: Most rollouts.
            scored: Whether the mean reward of the phase is a metric.
            delay: Seconds before the bar appears.
        """
        tally = Tally()
        every = max(1, -(-runs // POINTS))

        def on_done(rollout: Rollout) -> None:
            with self._lock:
                tally.add(rollout)
                self._total.add(rollout)
                bar.set_postfix({"score": f"{tally.score:.3f}"} | tally.spent, refresh=False)
                bar.update()
                if tally.rollouts % every == 0:
                    add_point()

        def add_point() -> None:
            self._log(self._total.totals() | ({"score": tally.score} if scored else {}))

        with tqdm(total=runs, desc=name, unit="run", delay=delay) as bar:
            try:
                yield on_done
            finally:
                with self._lock:
                    if tally.rollouts % every:
                        add_point()

    def figure(self, name: str, value: float | None) -> None:
        """Log a figure of the report as soon as it is known."""
        if value is not None:
            self._log({name: value})

    def finish(self, report: FinetuneReport) -> None:
        """Log what is known at the end, and the report."""
        for name in FINAL:
            self.figure(name, getattr(report, name))
        self._tell(lambda log: log.finish(report.to_dict()))

    def _log(self, metrics: dict[str, float]) -> None:
        self._tell(lambda log: log.log(metrics, self._total.rollouts))

    def _tell(self, what: Callable[[MetricsLog], None]) -> None:
        for log in list(self._logs):
            try:
                what(log)
            except Exception:
                self._logs.remove(log)
                warn_once(f"{type(log).__name__}: the compile's metrics are no longer logged.")
