"""The head of a list output as it decides: for each option, whether it is in the list.

A trained head decides each option by itself, p_o = σ(logit_o), with the logits of `dspy_router.folded.FoldedHead`. The
option's bias is its own threshold on what its weights say.

An untrained head knows cosines, and what cosine means "yes" depends on the options: the best one is 0.25 among the 7
tools of SNIPS, 0.4 among CLINC150's 150 intents and beyond 0.45 among the 77 of one bank. What carries over is how an
option compares with the others. So the untrained head reads its logits ℓ as a choice among the options and a further
one, that none of them fits, and takes every option with a share in it of at least `FAIR_SHARE`:

    logit_o = ℓ_o - log(Σ_j exp ℓ_j + exp ℓ_none) - log FAIR_SHARE,    ℓ_none that of a cosine of `NO_FIT`

Both numbers were chosen on validation rows of the three data sets, joined in ones, twos and threes.
"""

from typing import Any

import numpy as np

from dspy_router.folded import FoldedHead, require_candidates

FAIR_SHARE = 0.15  # micro-F1 is within 0.02 of the best from 0.1 to 0.2 on all three
NO_FIT = 0.25  # a cosine; micro-F1 is within 0.02 of the best from 0.2 to 0.3


class FoldedListHead(FoldedHead):
    """Logits, probabilities and choices of `dspy_router.list_heads.ListHead`, without gradient.

    Args:
        parameters: Those of `FoldedHead`, and `apart` []: 1 where each option is decided by itself, 0 untrained.

    Example:
        >>> head = FoldedListHead.untrained(np.eye(3, dtype=np.float32))
        >>> head.chosen(np.array([[0.0, 0.7, 0.7]], np.float32)).tolist()
        [[False, True, True]]
        >>> head.policy(np.array([0.0, 0.7, 0.7], np.float32)).round(2)
        array([0.  , 0.77, 0.77])
    """

    @staticmethod
    def _further() -> dict[str, np.ndarray]:
        return {"apart": np.array(0.0, np.float32)}

    def policy(self, vectors: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, k], float64, of each option to be in the list; they do not sum to one.

        Args:
            vectors: Float32 [n, d] or [d].
            candidates: Bool [k] or [n, k], the options in question, at least one: the others get 0, and an untrained
                head compares the candidates alone. All by default.

        Raises:
            ValueError: As for `FoldedHead`.
        """
        found: np.ndarray = np.exp(-np.logaddexp(0.0, -self._decided(vectors, candidates)))
        return found

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """Logits [n, k] of input vectors [n, d]."""
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

    def _decided(self, vectors: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
        logits = super().logits(vectors).astype(np.float64)
        if candidates is not None:
            require_candidates(logits, candidates)
            logits = np.where(candidates, logits, -np.inf)
        if not self.parameters["apart"]:
            sharpness = float(self.parameters["scale"]) / float(self.parameters["temperature"])
            none = np.full((*logits.shape[:-1], 1), sharpness * NO_FIT)
            logits = logits - np.logaddexp.reduce(np.concatenate([logits, none], axis=-1), axis=-1, keepdims=True)
            logits = logits - np.log(FAIR_SHARE)
        return logits


def folded_form(field: Any) -> type[FoldedHead]:
    """The head that decides a field, by whether it is a `ListField`."""
    return FoldedListHead if field.several else FoldedHead
