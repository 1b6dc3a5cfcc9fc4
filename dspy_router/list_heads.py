"""The torch head of a list output; `dspy_router.folded_lists` says how it decides."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dspy_router.folded import PRIOR_SCALE, ZERO_SHOT_TEMPERATURE
from dspy_router.folded_lists import FAIR_SHARE, NO_FIT, FoldedListHead
from dspy_router.heads import OptionHead


class ListHead(OptionHead):
    """Logits over the options of a list, each in it or not by itself.

    Args:
        option_vectors: Float tensor [k, d], one unit vector an option, in declaration order; k may be 1.
        scale: As for `OptionHead`.
        temperature: As for `OptionHead`.

    Example:
        >>> head = ListHead(torch.eye(3))
        >>> (head(torch.tensor([[0.0, 0.7, 0.7]])) > 0).tolist()
        [[False, True, True]]
    """

    fewest: ClassVar[int] = 1
    folded_form = FoldedListHead
    apart: Tensor

    def __init__(
        self, option_vectors: Tensor, *, scale: float = PRIOR_SCALE, temperature: float = ZERO_SHOT_TEMPERATURE
    ) -> None:
        super().__init__(option_vectors, scale=scale, temperature=temperature)
        self.register_buffer("apart", torch.tensor(0.0))  # 1 where each option is decided by itself, 0 untrained

    def begin_training(self) -> None:
        """See `OptionHead`; from now on each option is decided by itself."""
        super().begin_training()
        self.apart.fill_(1.0)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits [n, k] of input vectors [n, d]; differentiable in the head's parameters."""
        logits = super().forward(vectors)
        if self.apart:
            return logits
        none = (self.scale * NO_FIT / self.temperature).expand(*logits.shape[:-1], 1)
        return logits - torch.cat([logits, none], dim=-1).logsumexp(dim=-1, keepdim=True) - np.log(FAIR_SHARE)
