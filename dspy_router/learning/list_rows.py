"""What a list's head is fitted to: one row an input, with what is known of each option's being in the list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dspy_router.learning.rows import SETTLED, Objective, TargetRows
from dspy_router.learning.rows_loss import RowsLoss


@dataclass(frozen=True)
class ListRows:
    """What is known of n inputs about k options, each in the list (True) or not (False) by itself.

    Attributes:
        target: Float32 [n, k, 2], for True and for False, to be read by the objective.
        objective: Int8 [n, k], values of `Objective`.
        weight: Float32 [n, k]: how much it counts; 0 where nothing is known.
    """

    target: np.ndarray
    objective: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.weight.ndim != 2
            or self.objective.shape != self.weight.shape
            or self.target.shape != (*self.weight.shape, 2)
        ):
            raise ValueError(
                f"Shapes do not fit: target {self.target.shape}, objective {self.objective.shape}, weight "
                f"{self.weight.shape}; expected [n, k, 2], [n, k] and [n, k]."
            )

    @classmethod
    def unknown(cls, rows: int, options: int) -> "ListRows":
        """Rows of which nothing is known yet."""
        return cls(
            np.ones((rows, options, 2), np.float32),
            np.full((rows, options), Objective.LIKELIHOOD, np.int8),
            np.zeros((rows, options), np.float32),
        )

    @classmethod
    def from_sets(cls, members: np.ndarray) -> "ListRows":
        """Rows for gold lists, bool [n, k].

        Example:
            >>> ListRows.from_sets(np.array([[True, False]])).target.tolist()
            [[[1.0, 0.0], [0.0, 1.0]]]
        """
        members = np.asarray(members, bool)
        target = np.stack([members, ~members], axis=-1).astype(np.float32)
        return cls(target, np.full(members.shape, Objective.LIKELIHOOD, np.int8), np.ones(members.shape, np.float32))

    @classmethod
    def joined(cls, parts: Sequence["ListRows"]) -> "ListRows":
        """All rows of several parts, in order; at least one part."""
        columns = zip(*((part.target, part.objective, part.weight) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def part(self, chosen: np.ndarray) -> "ListRows":
        """Some of the rows: bool [n], or int."""
        return ListRows(self.target[chosen], self.objective[chosen], self.weight[chosen])

    def with_labels(self, options: np.ndarray, weight: float) -> "ListRows":
        """These rows, and behind them one for each of some options, int [m], in which it alone is in the list."""
        labels = ListRows.from_sets(options[:, None] == np.arange(self.weight.shape[1]))
        return ListRows.joined([self, ListRows(labels.target, labels.objective, weight * labels.weight)])

    def __len__(self) -> int:
        return len(self.weight)

    def worth(self, chosen: np.ndarray) -> np.ndarray:
        """How good lists, bool [n, k], are by what is known, option by option: float [n, k], as `TargetRows.worth`."""
        choice = np.where(chosen, 0, 1).reshape(-1)
        return self.each().worth(choice).reshape(self.weight.shape)

    def loss(self, margin: float = 0.0) -> "ListLoss":
        """The loss of logits for these rows, as a function; `margin` is that of `RowsLoss`."""
        return ListLoss(self, margin)

    def each(self) -> TargetRows:
        """A row for every input and option."""
        return TargetRows(self.target.reshape(-1, 2), self.objective.reshape(-1), self.weight.reshape(-1))


class ListLoss:
    """The weighted mean loss, over inputs and options, of logits for rows: that of `RowsLoss` for two options each.

    The logit of False is 0, so that softmax over the two is the logistic function of a list head's logit. Where it is
    settled whether an option is in the list, which is nearly everywhere, the loss is log(1 + exp(margin ∓ logit)).
    """

    def __init__(self, rows: ListRows, margin: float = 0.0) -> None:
        each = rows.each()
        settled = (rows.objective == Objective.LIKELIHOOD) & (rows.target.sum(axis=-1) < SETTLED)
        weight = rows.weight / rows.weight.sum()
        self._options = rows.weight.shape[1]
        self._margin = margin
        self._sign = torch.from_numpy(np.where(rows.target[..., 0] >= rows.target[..., 1], 1.0, -1.0).astype("f4"))
        self._settled = torch.from_numpy(np.where(settled, weight, 0.0).astype("f4"))
        self._weight = torch.from_numpy(weight)
        open_ = np.where(settled, 0.0, weight).astype("f4").reshape(-1)
        self._open_share = float(open_.sum())
        self._open = RowsLoss(replace(each, weight=open_), margin) if self._open_share else None

    def __call__(self, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Loss of logits [n, k], or of the rows at `index` (int [m]) for logits [m, k]."""
        part: slice | Tensor = slice(None) if index is None else index
        # A part of which nothing is known has no loss.
        return self.share(logits, part) / self._weight[part].sum().clamp_min(torch.finfo(torch.float32).tiny)

    def share(self, logits: Tensor, part: slice | Tensor) -> Tensor:
        """What a part of the rows adds to the loss of all, for logits of that part alone."""
        losses = torch.nn.functional.softplus(self._margin - self._sign[part] * logits)
        total = (self._settled[part] * losses).sum()
        if self._open is None:
            return total
        pairs = torch.arange(len(self._sign) * self._options).reshape(-1, self._options)[part].reshape(-1)
        both = torch.stack([logits, torch.zeros_like(logits)], dim=-1).reshape(-1, 2)
        return total + self._open_share * self._open.share(both, pairs)
