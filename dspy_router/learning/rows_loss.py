"""The loss of logits for rows of every objective, made once and called in every step of a fit."""

import torch
from torch import Tensor

from dspy_router.learning.objectives import partial_likelihood, soft_cross_entropy
from dspy_router.learning.policy_objectives import expected_reward
from dspy_router.learning.rows import REWARD_SCALE, SETTLED, Objective, TargetRows


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
