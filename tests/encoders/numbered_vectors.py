"""Vectors that tell which text they belong to, for the tests of the cache and the processes that they start."""

import numpy as np

from dspy_router.encoders.base import Fingerprint
from dspy_router.encoders.cache import VectorCache

__all__ = ["ENCODER", "VectorCache", "vectors"]

ENCODER = Fingerprint("words", "", "5f", dimension=64)


def vectors(start: int, stop: int) -> dict[str, np.ndarray]:
    return {f"text {number}": np.full(64, number, np.float32) for number in range(start, stop)}
