"""The head of a list output: for each option, whether it is in the list.

A trained head decides each option by itself, p_o = σ(logit_o), with the logits of `OptionHead`. The option's bias is
its own threshold on what its weights say.

An untrained head knows cosines, and what cosine means "yes" depends on the options: the best one is 0.25 among the 7
tools of SNIPS, 0.4 among CLINC150's 150 intents and beyond 0.45 among the 77 of one bank. What carries over is how an
option compares with the others. So the untrained head reads its logits ℓ as a choice among the options and a further
one, that none of them fits, and takes every option with a share in it of at least `FAIR_SHARE`:

    logit_o = ℓ_o - log(Σ_j exp ℓ_j + exp ℓ_none) - log FAIR_SHARE,    ℓ_none that of a cosine of `NO_FIT`

Both numbers were chosen on validation rows of the three data sets, joined in ones, twos and threes.
"""

import hashlib
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import expit, logsumexp
from torch import Tensor

from dspy_router.heads import PRIOR_SCALE, ZERO_SHOT_TEMPERATURE, OptionHead

FAIR_SHARE = 0.15  # micro-F1 is within 0.02 of the best from 0.1 to 0.2 on all three
NO_FIT = 0.25  # a cosine; micro-F1 is within 0.02 of the best from 0.2 to 0.3


class ListHead(OptionHead):
    """Logits over the options of a list, each in it or not by itself; see the module's text.

    Args:
        option_vectors: Float tensor [k, d], one unit vector an option, in declaration order; k may be 1.
        scale: As for `OptionHead`.
        temperature: As for `OptionHead`.

    Example:
        >>> head = ListHead(torch.eye(3))
        >>> head.chosen(np.array([[0.0, 0.7, 0.7]], np.float32)).tolist()
        [[False, True, True]]
        >>> head.policy(np.array([0.0, 0.7, 0.7], np.float32)).round(2)
        array([0.  , 0.77, 0.77])
    """

    fewest: ClassVar[int] = 1
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

    def policy(self, vectors: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, k], float64, of each option to be in the list; they do not sum to one.

        Args:
            vectors: Float32 [n, d] or [d].
            candidates: Bool [k] or [n, k], the options in question, at least one: the others get 0, and an untrained
                head compares the candidates alone. All by default.

        Raises:
            ValueError: As for `OptionHead`.
        """
        found: np.ndarray = expit(self._decided(vectors, candidates))
        return found

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """Logits [n, k] of input vectors [n, d], without gradient."""
        return self._decided(vectors, None).astype(np.float32)

    def chosen(self, vectors: np.ndarray) -> np.ndarray:
        """Bool [n, k]: the options with a probability of at least one half."""
        found: np.ndarray = self.policy(vectors) >= 0.5
        return found

    def certainty(self, vectors: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
        """Log-probability [n], float64, of the lists that are taken for vectors [n, d], the options as independent."""
        found = self.policy(vectors, candidates)
        found = found if candidates is None else found[:, candidates]
        certainty: np.ndarray = np.log(np.maximum(found, 1.0 - found)).sum(axis=1)
        return certainty

    @property
    def digest(self) -> str:
        """See `OptionHead`."""
        return hashlib.sha256(f"{super().digest} {float(self.apart)}".encode()).hexdigest()

    def _decided(self, vectors: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
        logits = super().logits(vectors).astype(np.float64)
        if candidates is not None:
            self.require_candidates(logits, candidates)
            logits = np.where(candidates, logits, -np.inf)
        if not self.apart:
            none = np.full((*logits.shape[:-1], 1), float(self.scale) * NO_FIT / float(self.temperature))
            logits = logits - logsumexp(np.concatenate([logits, none], axis=-1), axis=-1, keepdims=True)
            logits = logits - np.log(FAIR_SHARE)
        return logits


def new_head(field: Any, option_vectors: Tensor) -> OptionHead:
    """An untrained head for a field, by whether that is a `ListField`, over its options' vectors [k, d]."""
    return ListHead(option_vectors) if field.several else OptionHead(option_vectors)
