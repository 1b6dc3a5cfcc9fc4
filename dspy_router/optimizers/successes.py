"""Whether the metric ever said yes, on what and to which options."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from dspy_router.feedback import Feedback
from dspy_router.optimizers.outcomes import TRIED, RewardReading
from dspy_router.optimizers.runs import runs_of

logger = logging.getLogger(__name__)

FEWEST_TRIES = 5  # an option that failed less often is not worth a word
MOST_NAMED = 10


@dataclass(frozen=True)
class Successes:
    """What came of the options that were tried.

    Attributes:
        runs: Runs with a reward, or decisions that were rewarded themselves.
        succeeded: Those that earned the best reward.
        best_reward: That reward.
        highest: The most that any of them earned; None without any.
        graded: Whether less than the best teaches, too: rewards differ, and their size counts.
        failed_examples: Examples on which nothing that was tried succeeded.
        examples: Examples on which something was tried.
        never_rewarded: How often each option was tried that never was part of a success, most often first, from
            `FEWEST_TRIES` tries; by its name after those of its route and field. Empty where rewards are graded.
    """

    runs: int
    succeeded: int
    best_reward: float
    highest: float | None
    graded: bool
    failed_examples: int
    examples: int
    never_rewarded: Mapping[str, int]

    @classmethod
    def among(cls, feedback: Sequence[Feedback], reading: RewardReading) -> "Successes":
        """Count in the rows whose options were tried.

        Example:
            >>> row = Feedback("rollout", "example 1", "planner", "tool", "how far?", ("map", "mail"), "map", 1.0, 0.0)
            >>> found = Successes.among([row], RewardReading())
            >>> found.runs, found.succeeded, found.failed_examples
            (1, 0, 1)
        """
        tried = [row for row in feedback if row.source in TRIED and row.has_reward]
        firsts = [run[0] for run in runs_of(tried)]
        succeeded = [row for row in firsts if reading.success(row)]
        examples = {row.example for row in firsts}
        net = {reading.net(row) for row in firsts}
        graded = len(net) > 1 and reading.graded(tried)
        tries, rewarded = Counter(map(_option, tried)), {_option(row) for row in tried if reading.success(row)}
        return cls(
            runs=len(firsts),
            succeeded=len(succeeded),
            best_reward=reading.best_reward,
            highest=max(net, default=None),
            graded=graded,
            failed_examples=len(examples - {row.example for row in succeeded}),
            examples=len(examples),
            never_rewarded={
                option: count
                for option, count in tries.most_common()
                if count >= FEWEST_TRIES and option not in rewarded and not graded
            },
        )

    @property
    def alarm(self) -> str | None:
        """What is wrong if nothing succeeded, or more than that, and what to check."""
        if self.highest is not None and self.highest > self.best_reward and not isclose(self.highest, self.best_reward):
            return (
                f"A run earned {self.highest:g}, more than best_reward={self.best_reward:g}: from there on every score "
                "counts as the best, so better and worse ones are not told apart. Scale the metric, or say "
                "RouteFinetune(best_reward=...)."
            )
        if not self.runs or self.succeeded or self.graded:
            return None
        return (
            f"None of {self.runs:,} rewarded runs reached best_reward={self.best_reward:g} (the most was "
            f"{self.highest:g}), so nothing was learned from them. Call the metric on one example with a prediction "
            "that is right: it should give best_reward. Then check that the program passes on what the route decides."
        )

    @property
    def unrewarded(self) -> str:
        """The options that were never rewarded, in a line."""
        named = [f"{option} ({count:,} tries)" for option, count in self.never_rewarded.items()]
        more = [f"and {len(named) - MOST_NAMED:,} more"] if len(named) > MOST_NAMED else []
        return ", ".join(named[:MOST_NAMED] + more)

    def warn(self) -> None:
        """Log what the user should look into."""
        if self.alarm:
            logger.warning("%s", self.alarm)
        elif self.never_rewarded:
            logger.warning(
                "Some options were tried and never rewarded: %s. Where one of them is right, look at what the metric "
                "compares and at what the program returns.", self.unrewarded,
            )  # fmt: skip


def _option(row: Feedback) -> str:
    """As in `planner.tool=search`; without the route's name where the route is the program."""
    return f"{row.route}.{row.field}={row.chosen}".removeprefix("self.")
