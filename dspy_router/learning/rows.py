"""What a head is fitted to: one row an input, with what is known about its options."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspy_router.learning.objectives import partial_likelihood, soft_cross_entropy
from dspy_router.learning.policy_objectives import expected_reward

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
        return RowsLoss(self, margin)


class RowsLoss:
    """The weighted mean loss of logits for rows, with all that does not depend on the logits made once.

    Args:
        rows: At least one.
        margin: Taken off the right option's logit before the loss, in rows of likelihoods that settle which it is (the
            additive margin of Wang et al., "Additive Margin Softmax", 2018).
    """

    def __init__(self, rows: TargetRows, margin: float = 0.0) -> None:
        target = torch.from_numpy(rows.target)
        likelihood = torch.from_numpy(rows.objective == Objective.LIKELIHOOD)
        settled = likelihood & (target.sum(dim=1) < SETTLED)
        self._target = target
        self._weight = torch.from_numpy(rows.weight / rows.weight.sum())
        self._margin = margin * settled
        self._label = target.argmax(dim=1)
        self._parts = {
            "settled": settled,
            "open": likelihood & ~settled,
            "taught": torch.from_numpy(rows.objective == Objective.DISTRIBUTION),
            "rewarded": torch.from_numpy(rows.objective == Objective.REWARD),
        }
        self._parts = {name: rows_of for name, rows_of in self._parts.items() if bool(rows_of.any())}

    def __call__(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Loss of logits [n, k], or of the rows at `index` (int [m]) for logits [m, k]."""
        part: slice | Tensor = slice(None) if index is None else index
        return self.share(logits, part) / self._weight[part].sum()

    def share(self, logits: Tensor, part: slice | Tensor) -> Tensor:
        """What a part of the rows adds to the loss of all, for logits of that part alone."""
        target, weight = self._target[part], self._weight[part]
        total = logits.new_zeros(())
        for name, rows_of in self._parts.items():
            own, own_target, own_weight = logits, target, weight
            label, margin = self._label[part], self._margin[part]
            if len(self._parts) > 1:
                rows = rows_of[part].nonzero().squeeze(1)
                own, own_target, own_weight = logits[rows], target[rows], weight[rows]
                label, margin = label[rows], margin[rows]
            total = total + (own_weight * self._losses(name, own, own_target, label, margin)).sum()
        return total

    @staticmethod
    def _losses(part: str, logits: Tensor, target: Tensor, label: Tensor, margin: Tensor) -> Tensor:
        if part == "settled":
            # Of an option with likelihood 1 among next to none: cross-entropy, whose margin shows in one logit alone.
            logits = logits.scatter_add(1, label[:, None], -margin[:, None])
            return torch.nn.functional.cross_entropy(logits, label, reduction="none")
        if part == "open":
            return partial_likelihood(logits, target)
        if part == "taught":
            return soft_cross_entropy(logits, target)
        return REWARD_SCALE * expected_reward(logits, target)
