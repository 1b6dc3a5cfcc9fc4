"""What a head is fitted to: one row an input, with what is known about its right option."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspy_router.learning.objectives import set_likelihood, soft_cross_entropy


@dataclass(frozen=True)
class TargetRows:
    """What is known of n inputs about k options.

    Attributes:
        possible: Bool [n, k]: options that may be right. One True is a label; tries that failed are False.
        soft: Float32 [n, k]: a teacher's probabilities, in rows that have them; zero elsewhere.
        weight: Float32 [n]: how much a row counts.
    """

    possible: np.ndarray
    soft: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        if not (self.possible.shape == self.soft.shape and self.weight.shape == self.possible.shape[:1]):
            raise ValueError(
                f"Shapes do not fit: possible {self.possible.shape}, soft {self.soft.shape}, "
                f"weight {self.weight.shape}; expected [n, k], [n, k] and [n]."
            )

    @classmethod
    def from_labels(cls, labels: np.ndarray, options: int) -> "TargetRows":
        """Rows for gold labels, int [n], among so many options.

        Example:
            >>> TargetRows.from_labels(np.array([1]), 3).possible.tolist()
            [[False, True, False]]
        """
        possible = np.asarray(labels)[:, None] == np.arange(options)
        return cls(possible, np.zeros(possible.shape, np.float32), np.ones(len(possible), np.float32))

    def __len__(self) -> int:
        return len(self.weight)

    def loss(self, margin: float = 0.0) -> "RowsLoss":
        """The loss of logits for these rows, as a function; `margin` is that of `RowsLoss`."""
        return RowsLoss(self, margin)


class RowsLoss:
    """The weighted mean loss of logits for rows, with the rows as tensors made once.

    Args:
        rows: At least one.
        margin: Taken off the logits of the options that may be right before the loss, in rows without a teacher's
            probabilities (the additive margin of Wang et al., "Additive Margin Softmax", 2018).
    """

    def __init__(self, rows: TargetRows, margin: float = 0.0) -> None:
        self._soft_rows = torch.from_numpy(rows.soft.sum(axis=1) > 0)
        self._labels = torch.from_numpy(rows.possible.argmax(axis=1))
        self._labelled = bool((rows.possible.sum(axis=1) == 1).all()) and not bool(self._soft_rows.any())
        self._possible = torch.from_numpy(rows.possible)
        self._margin = margin * (self._possible & ~self._soft_rows[:, None]).float() if margin else None
        self._soft = torch.from_numpy(rows.soft)
        self._weight = torch.from_numpy(rows.weight / rows.weight.sum())

    def __call__(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Loss of logits [n, k], or of the rows at `index` (int [m]) for logits [m, k]."""
        weight = self._weight if index is None else self._weight[index] / self._weight[index].sum()
        if self._margin is not None:
            logits = logits - (self._margin if index is None else self._margin[index])
        if self._labelled:
            labels = self._labels if index is None else self._labels[index]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        else:
            part = slice(None) if index is None else index
            losses = set_likelihood(logits, self._possible[part])
            soft_rows = self._soft_rows[part]
            if bool(soft_rows.any()):
                losses = torch.where(soft_rows, soft_cross_entropy(logits, self._soft[part]), losses)
        return (weight * losses).sum()
