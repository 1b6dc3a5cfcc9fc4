"""What a head is fitted to: one row an input, with what is known about its options."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dspy_router.learning.rows_loss import RowsLoss

# Rewards from 0 to 1 count like log-odds of this size, so that they stand up to the pull towards the descriptions. A
# round number, not tuned.
REWARD_SCALE = 10.0
SETTLED = 1.001  # a row whose likelihoods, at most 1 each, sum to less is about one option


class Objective(enum.IntEnum):
    """What the target of a row is, and so which loss it gets."""

    LIKELIHOOD = 0
    """How likely the observations are if the option is the right one: `partial_likelihood`."""
    DISTRIBUTION = 1
    """A teacher's probabilities: `soft_cross_entropy`."""
    REWARD = 2
    """What the option earns, known or estimated: `expected_reward`."""


@dataclass(frozen=True)
class TargetRows:
    """What is known of n inputs about k options.

    Attributes:
        target: Float32 [n, k], to be read by the row's objective.
        objective: Int8 [n], values of `Objective`.
        weight: Float32 [n]: how much a row counts.
    """

    target: np.ndarray
    objective: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        if self.target.ndim != 2 or not self.objective.shape == self.weight.shape == self.target.shape[:1]:
            raise ValueError(
                f"Shapes do not fit: target {self.target.shape}, objective {self.objective.shape}, weight "
                f"{self.weight.shape}; expected [n, k], [n] and [n]."
            )

    @classmethod
    def of(cls, objective: Objective, target: np.ndarray, weight: np.ndarray | None = None) -> "TargetRows":
        """Rows of one objective; each counts 1 unless `weight` [n] says otherwise."""
        count = len(target)
        weights = np.ones(count, np.float32) if weight is None else np.asarray(weight, np.float32)
        return cls(np.asarray(target, np.float32), np.full(count, objective, np.int8), weights)

    @classmethod
    def from_labels(cls, labels: np.ndarray, options: int) -> "TargetRows":
        """Rows for gold labels, int [n], among so many options.

        Example:
            >>> TargetRows.from_labels(np.array([1]), 3).target.tolist()
            [[0.0, 1.0, 0.0]]
        """
        return cls.of(Objective.LIKELIHOOD, np.asarray(labels)[:, None] == np.arange(options))

    @classmethod
    def joined(cls, parts: Sequence["TargetRows"]) -> "TargetRows":
        """All rows of several parts, in order; at least one part."""
        columns = zip(*((part.target, part.objective, part.weight) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def part(self, chosen: np.ndarray) -> "TargetRows":
        """Some of the rows: bool [n], or int."""
        return TargetRows(self.target[chosen], self.objective[chosen], self.weight[chosen])

    def with_labels(self, options: np.ndarray, weight: float) -> "TargetRows":
        """These rows, and behind them a labelled one for each of some options, int [m]."""
        labels = TargetRows.from_labels(options, self.target.shape[1])
        labels = TargetRows.of(Objective.LIKELIHOOD, labels.target, np.full(len(options), weight))
        return TargetRows.joined([self, labels])

    def __len__(self) -> int:
        return len(self.weight)

    def worth(self, chosen: np.ndarray) -> np.ndarray:
        """How good a choice of options, int [n], is by what is known: float [n].

        1 or 0 for whether the option is among the likeliest; the reward itself where rewards are known.
        """
        taken = self.target[np.arange(len(chosen)), chosen]
        likeliest = taken >= 0.5 * self.target.max(axis=1)
        return np.where(self.objective == Objective.REWARD, taken, likeliest)

    def loss(self, margin: float = 0.0) -> "RowsLoss":
        """The loss of logits for these rows, as a function; `margin` is that of `RowsLoss`."""
        from dspy_router.learning.rows_loss import (
            RowsLoss,  # brings torch, which a route that only decides does without
        )

        return RowsLoss(self, margin)
