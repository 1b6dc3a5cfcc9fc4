"""Which written requests are kept: what an LM writes is not trusted."""

from collections.abc import Callable, Sequence

import numpy as np

EMPTY, TOO_LONG, NEAR_DUPLICATE, NEAR_VALIDATION = "empty", "too long", "near-duplicate", "near the validation set"
CHUNK = 512  # texts compared at a time: a chunk's similarities to all texts kept are in memory at once


class RequestFilter:
    """Keeps texts that are usable, new, and far enough from the validation set.

    Texts are compared by the cosine of their vectors: greedily in the order given, so that of two that are near each
    other the earlier is kept. All options' requests are compared with one another: two that the encoder can hardly
    tell apart would only contradict each other under different labels.

    Args:
        encode: Unit vectors [n, d] of n texts.
        validation: Texts of the validation set, which training data must not repeat.
        max_similarity: The largest cosine at which two texts count as different, in (-1, 1].
        max_length: The most characters of a text.

    Example:
        >>> letters = lambda texts: np.array([[text.count("a"), text.count("b")] for text in texts]) / 2
        >>> RequestFilter(letters, ["bb"], max_similarity=0.9, max_length=9).judge(["aa", " ", "aa", "bb"])
        [None, 'empty', 'near-duplicate', 'near the validation set']
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], np.ndarray],
        validation: Sequence[str],
        *,
        max_similarity: float,
        max_length: int,
    ) -> None:
        self.encode = encode
        self.max_similarity = max_similarity
        self.max_length = max_length
        self._validation = encode(validation)
        self._kept = self._validation[:0]

    def judge(self, texts: Sequence[str]) -> list[str | None]:
        """For each text the reason why it is dropped, or None if it is kept; later calls compare with it then."""
        reasons = [EMPTY if not text.strip() else TOO_LONG if len(text) > self.max_length else None for text in texts]
        usable = [index for index, reason in enumerate(reasons) if reason is None]
        vectors = self.encode([texts[index] for index in usable])
        for start in range(0, len(usable), CHUNK):
            chunk = vectors[start : start + CHUNK]
            leaks, repeats = self._near(chunk, self._validation), self._near(chunk, self._kept)
            alike = chunk @ chunk.T > self.max_similarity
            kept = np.zeros(len(chunk), dtype=bool)
            for row, index in enumerate(usable[start : start + CHUNK]):
                if leaks[row]:
                    reasons[index] = NEAR_VALIDATION
                elif repeats[row] or alike[row, kept].any():
                    reasons[index] = NEAR_DUPLICATE
                kept[row] = reasons[index] is None
            self._kept = np.concatenate([self._kept, chunk[kept]])
        return reasons

    def _near(self, vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        return (vectors @ others.T > self.max_similarity).any(axis=1)
