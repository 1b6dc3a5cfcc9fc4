"""Rewards that arrive after the decisions they are for: their line in a log, and how they join the rows."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_router.feedback import Feedback


@dataclass(frozen=True)
class LateReward:
    """A reward for one decision or for all decisions of one run.

    Attributes:
        reward: The number; None if what arrived was no finite number, which `error` then quotes.
        decision: Id of the decision it speaks of; empty if it is for a run.
        run: Key of the run it is for; empty if it is for one decision.
        decisions: How many decisions the run made, if known: a row that was lost does not make another look alone.
        cost: Dollars the run's LM calls cost; None if unknown.
        error: Why there is no reward.
    """

    reward: float | None
    decision: str = ""
    run: str = ""
    decisions: int | None = None
    cost: float | None = None
    error: str | None = None

    @classmethod
    def of(
        cls, value: Any, *, decision: str = "", run: str = "", decisions: int | None = None, cost: float | None = None
    ) -> "LateReward":
        """A reward from whatever a metric or a user gave.

        Example:
            >>> LateReward.of(True, decision="4f1c").reward, LateReward.of(math.nan, run="9d02").error
            (1.0, 'reward is nan')
        """
        reward, error = as_reward(value)
        cost, _ = (None, None) if cost is None else as_reward(cost)
        return cls(reward, decision, run, decisions, cost, error)

    def to_json(self) -> str:
        """One line of JSON, without what is not known.

        Example:
            >>> LateReward(0.5, decision="4f1c").to_json()
            '{"reward": 0.5, "decision": "4f1c"}'
        """
        entry = {key: value for key, value in vars(self).items() if key == "reward" or value not in (None, "")}
        return json.dumps(entry, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "LateReward":
        """Read the JSON object that `to_json` wrote.

        Raises:
            ValueError, TypeError, AttributeError: If it is none.
        """
        known = {field.name for field in fields(cls)}
        late = cls(**{key: value for key, value in entry.items() if key in known})
        if not isinstance(late.decision, str) or not isinstance(late.run, str) or bool(late.decision) == bool(late.run):
            raise ValueError("a reward is for one decision or for one run")
        if any(not isinstance(value, (int, float, type(None))) for value in (late.reward, late.cost, late.decisions)):
            raise TypeError("a reward is a number")
        return late


def as_reward(value: Any) -> tuple[float | None, str | None]:
    """A reward as a finite number, or else None and what is wrong with it.

    Example:
        >>> as_reward(True), as_reward("good")
        ((1.0, None), (None, "reward is 'good'"))
    """
    try:
        reward = float(value)
    except (TypeError, ValueError, OverflowError):
        return None, f"reward is {repr(value)[:80]}"
    return (reward, None) if math.isfinite(reward) else (None, f"reward is {reward}")


def join_rewards(
    rows: Sequence["Feedback"], rewards: Iterable[LateReward]
) -> tuple[list["Feedback"], Mapping[str, int]]:
    """Rows with their rewards.

    The last reward for a decision, or for a run, counts; a decision's own overrules its run's. A reward's cost, where
    it names one, replaces what was known.

    Returns:
        The rows, and how many rewards were for nothing known, by reason.
    """
    ids = {row.id for row in rows if row.id}
    sizes = Counter(row.run for row in rows if row.run)
    of_decision: dict[str, LateReward] = {}
    of_run: dict[str, LateReward] = {}
    unknown: Counter[str] = Counter()
    for late in rewards:
        found, key = (of_decision, late.decision) if late.decision else (of_run, late.run)
        if key not in (ids if late.decision else sizes):
            unknown[f"reward of an unknown {'decision' if late.decision else 'run'}"] += 1
            continue
        earlier = found.get(key)
        found[key] = replace(late, cost=earlier.cost) if earlier is not None and late.cost is None else late

    def joined(row: "Feedback") -> "Feedback":
        own, run = of_decision.get(row.id), of_run.get(row.run)
        alone = sizes[row.run] <= 1 and (run is None or (run.decisions or 0) <= 1)
        late = own or run
        if late is None:
            # A reward that is still to come will speak of all the decisions of the run.
            return replace(row, sole=False) if row.reward is None and not alone else row
        costs = [entry.cost for entry in (own, run, row) if entry is not None and entry.cost is not None]
        return replace(
            row, reward=late.reward, error=late.error, sole=own is not None or alone, cost=next(iter(costs), None)
        )

    return [joined(row) for row in rows], unknown
