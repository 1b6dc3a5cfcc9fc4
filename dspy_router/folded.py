"""A head as it decides: its parameters folded into one linear layer, in numpy alone.

A process that only decides never imports torch, which would take it a second or more and over 100 MB. The torch form,
`dspy_router.heads`, is made from the same parameters when somebody asks for it: to train, or to differentiate.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dspy_router.scan import HalfPrecisionScan

# Chosen on CLINC150's validation rows and held-out BANKING77 training rows, 5 and 10 examples an option and all
# of them: accuracy is flat between 4 and 7 and falls off by 10.
PRIOR_SCALE = 5.0
# Before training, cosines are sharpened by s / temperature = 20: on the training rows of CLINC150, BANKING77 and SNIPS
# the probabilities are then within 0.05 of the truth (expected calibration error). Fitting sets it to 1.
ZERO_SHOT_TEMPERATURE = 0.25
# Numbers of a matrix beyond which it is multiplied by a vector in blocks, each of so few numbers that every release of
# OpenBLAS takes one thread. Threads wait for each other on busy cores: 4,000 options then take 20 ms, in blocks 0.5.
LARGE, BLOCK = 2**17, 2**13


class FoldedHead:
    """Logits, probabilities and choices of `dspy_router.heads.OptionHead`, without gradient.

    Args:
        parameters: The head's, by the names they have there: float32 `option_vectors` and `weight` [k, d], `bias` [k],
            `shared_map` [d, d], `scale` and `temperature` []. Kept, not copied: do not change them.

    Attributes:
        weights: Float32 [k, d], temperature included.
        biases: Float32 [k], the same.

    Example:
        >>> head = FoldedHead.untrained(np.eye(3, dtype=np.float32))
        >>> head.chosen(np.array([[0.0, 1.0, 0.0]], np.float32)).tolist()
        [1]
    """

    def __init__(self, parameters: Mapping[str, np.ndarray]) -> None:
        self.parameters = parameters
        vectors, shared_map = parameters["option_vectors"], parameters["shared_map"]
        with np.errstate(all="ignore"):  # as torch does: who saves or loads a head refuses one that cannot decide
            weights = vectors + parameters["weight"]
            if shared_map.any():
                weights += vectors @ shared_map.T
            weights *= parameters["scale"]
            weights /= parameters["temperature"]
            self.weights = weights
            self.biases = parameters["bias"] / parameters["temperature"]

    @classmethod
    def untrained(cls, option_vectors: np.ndarray) -> "FoldedHead":
        """A head that knows the options by their vectors, float32 [k, d], alone."""
        count, dimension = option_vectors.shape
        return cls(
            {
                "option_vectors": option_vectors,
                "weight": np.zeros((count, dimension), np.float32),
                "bias": np.zeros(count, np.float32),
                "shared_map": np.zeros((dimension, dimension), np.float32),
                "scale": np.array(PRIOR_SCALE, np.float32),
                "temperature": np.array(ZERO_SHOT_TEMPERATURE, np.float32),
                **cls._further(),
            }
        )

    @staticmethod
    def _further() -> dict[str, np.ndarray]:
        """Parameters that an untrained head has beside the others."""
        return {}

    def with_option_vectors(self, option_vectors: np.ndarray) -> "FoldedHead":
        """The head with other vectors, float32 [k, d], for the same options."""
        return type(self)({**self.parameters, "option_vectors": option_vectors})

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """Logits [n, k] of vectors [n, d], or [k] of a vector [d]; among very many options, a vector's as in `scan`."""
        if vectors.size == vectors.shape[-1]:
            vector, scan = vectors.reshape(-1), self._scan
            single = scan.logits(vector) if scan is not None else product(self.weights, vector) + self.biases
            return single.reshape(*vectors.shape[:-1], -1)
        found: np.ndarray = vectors @ self.weights.T + self.biases
        return found

    def policy(self, vectors: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
        """Probabilities [n, k], float64, of input vectors [n, d]: what a route decides with.

        Args:
            vectors: Float32 [n, d] or [d].
            candidates: Bool [k] or [n, k], the options that may be chosen, at least one: the others get 0 and what they
                had goes to the candidates in proportion. All by default.

        Raises:
            ValueError: If the candidates have another shape, or an input has none.

        Example:
            >>> head = FoldedHead.untrained(np.eye(3, dtype=np.float32))
            >>> head.policy(np.eye(3, dtype=np.float32)[0], np.array([False, True, True]))
            array([0. , 0.5, 0.5])
        """
        logits = self.logits(vectors)
        if candidates is None:
            return softmax(logits)
        require_candidates(logits, candidates)
        return softmax(np.where(candidates, logits, -np.inf))

    def chosen(self, vectors: np.ndarray) -> np.ndarray:
        """Int [n]: the likeliest options for vectors [n, d]."""
        return self.logits(vectors).argmax(axis=-1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters: two heads with one digest have the same policy.

        Not of the folded layer, whose last bits are the processor's own.
        """
        digest = hashlib.sha256()
        for name in sorted(self.parameters):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.parameters[name]).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type["FoldedHead"], tuple[Mapping[str, np.ndarray]]]:
        return type(self), (self.parameters,)

    @cached_property
    def _scan(self) -> "HalfPrecisionScan | None":
        from dspy_router.scan import scan_of

        return scan_of(self.weights, self.biases)


def product(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """A matrix [k, d] times a vector [d]; a large one on one thread."""
    if matrix.size <= LARGE:
        found: np.ndarray = matrix @ vector
        return found
    rows = max(1, BLOCK // len(vector) // 4 * 4)  # a BLAS takes four at a time
    whole = len(matrix) // rows * rows
    blocks = matrix[:whole].reshape(-1, rows, len(vector)) @ vector
    return np.concatenate([blocks.reshape(-1), matrix[whole:] @ vector])


def require_candidates(logits: np.ndarray, candidates: np.ndarray) -> None:
    """Refuse what `FoldedHead.policy` cannot take for candidates."""
    if candidates.dtype != bool or candidates.shape not in (logits.shape[-1:], logits.shape):
        raise ValueError(
            f"Candidates must be bool, of shape {logits.shape[-1:]} or {logits.shape}; got {candidates.dtype}, "
            f"{candidates.shape}."
        )
    if not candidates.any(axis=-1).all():
        raise ValueError("No option is a candidate: give at least one for every input.")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
