"""How rewards are read: what counts as success, and what a run is worth once its cost is taken off."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback
from dspy_router.optimizers.settings import CostUnit

TRIED = ("rollout", "log")  # sources whose rewards were earned by trying an option
ROUNDING = 1e-9  # relative: a metric's parts, such as 0.3 + 0.6 + 0.1, can add up to a little less than the best


class Scored(Protocol):
    """A run with its reward and what it cost: a `Feedback` row or a `Rollout`."""

    @property
    def reward(self) -> float | None:
        """The metric's number."""

    @property
    def cost(self) -> float | None:
        """Dollars."""

    @property
    def tokens(self) -> int | None:
        """Tokens."""


@dataclass(frozen=True)
class RewardReading:
    """What the rewards of a compile mean.

    Attributes:
        best_reward: A run that earns this needs no better.
        cost_weight: Reward that one unit of cost is worth.
        cost_unit: What is counted as cost.
        noise: Share of 0/1 rewards that are wrong.
    """

    best_reward: float = 1.0
    cost_weight: float = 0.0
    cost_unit: CostUnit = "dollars"
    noise: float = 0.0

    def cost(self, row: Scored) -> float:
        """What the row's run cost, in the unit.

        Raises:
            RouteError: If dollars are wanted and the run's price is not known.
        """
        if self.cost_unit == "tokens":
            return float(row.tokens or 0)
        if row.cost is None and row.tokens:
            raise RouteError(
                f"cost_weight={self.cost_weight} is per dollar, but a run of {row.tokens:,} tokens has no known price: "
                "litellm knows none for its model. Give cost_unit='tokens' and a weight per token."
            )
        return row.cost or 0.0

    def knows_cost(self, row: Scored) -> bool:
        """Whether the row says what its run cost."""
        return row.tokens is not None if self.cost_unit == "tokens" else row.cost is not None

    def net(self, row: Scored) -> float:
        """The row's reward less what its cost is worth; the row has a reward."""
        assert row.reward is not None
        return row.reward - (self.cost_weight * self.cost(row) if self.cost_weight else 0.0)

    @property
    def enough(self) -> float:
        """What counts as the best reward: no less, but for rounding."""
        return self.best_reward - ROUNDING * max(1.0, abs(self.best_reward))

    def success(self, row: Scored) -> bool:
        """Whether the row's run earned the best there is."""
        return self.net(row) >= self.enough

    def graded(self, rows: Iterable[Feedback]) -> bool:
        """Whether runs earned more than one thing short of the best, or part of it, so that its size must count."""
        if self.cost_weight:
            return True
        tried = [row for row in rows if row.source in TRIED and row.has_reward and not row.error]
        short = {self.net(row) for row in tried if not self.success(row)}
        return len(short) > 1 or any(reward > 0 for reward in short)
