"""What every encoder is: text in, unit vectors out, with a cache, a fingerprint and safe concurrency."""

import abc
import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from dspy_router.encoders.cache import VectorCache
from dspy_router.encoders.gathering import Gathering
from dspy_router.encoders.weights import same_model
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

GATHER_LIMIT = 256  # the most texts of waiting callers encoded in one batch


@dataclass(frozen=True)
class Fingerprint:
    """What identifies an encoder: two encoders with one fingerprint give the same vectors.

    Attributes:
        name: The model's or function's name.
        revision: The model's revision; empty where there is none.
        weights: Digest of the weights, or of the vectors of a fixed text where weights cannot be seen.
        dimension: Length of a vector.
        normalized: Whether vectors have length one.
    """

    name: str
    revision: str
    weights: str
    dimension: int
    normalized: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible; `Fingerprint(**entry)` reads it back."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (dimension {self.dimension}, weights {self.weights[:12]})"


class Encoder(abc.ABC):
    """Base of all encoders.

    Subclasses give `_encode_batch` and `_fingerprint`; this class adds unit length, the check for values that
    are not finite, the cache, and the gathering of concurrent calls.

    An encoder is shared: `copy.deepcopy` of a program returns the same encoder object.

    Args:
        cache_size: How many texts' vectors are kept in memory, least recently used out first. At 384
            dimensions a thousand take about 1.6 MB. 0 keeps none.
        vector_cache: A file of vectors, shared with other runs and processes: its path, or a `VectorCache`. None by
            default. A fixed text's vector is looked up there before it is computed, and kept there.
    """

    trainable = False
    vector_cache: VectorCache | None = None

    def __init__(self, *, cache_size: int = 20_000, vector_cache: "VectorCache | str | Path | None" = None) -> None:
        if cache_size < 0:
            raise RouteError(f"cache_size={cache_size} is negative; give 0 to keep no vectors.")
        self.cache_size = cache_size
        self.vector_cache = VectorCache(vector_cache) if isinstance(vector_cache, str | Path) else vector_cache
        self._reset_runtime()

    def _reset_runtime(self) -> None:
        self._cache: LRUCache[str, np.ndarray] = LRUCache(self.cache_size)
        self._reset_threads()
        self._known_fingerprint: Fingerprint | None = None
        self._known_dimension: int | None = None
        _encoders.add(self)

    def _reset_threads(self) -> None:
        """Locks and queue as new: after a fork, nobody is left to release the one or to serve the other."""
        self._cache_lock = threading.Lock()
        self._gathering = Gathering(self._encode_and_keep, self._choose, self._workers)

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        """Vectors [n, d] of at least one text, of any length. Called by at most `_workers()` threads at once."""

    def _choose(self, texts: list[str]) -> Sequence[int]:
        """Indices of the waiting texts that the next batch holds, 0 among them: the first has waited longest."""
        return range(min(len(texts), GATHER_LIMIT))

    def _workers(self) -> int:
        """How many threads may be in `_encode_batch` at once."""
        return 1

    @abc.abstractmethod
    def _fingerprint(self) -> Fingerprint:
        """Compute the fingerprint; called once."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Name, revision, weights digest, dimension and normalisation; loads the model if need be."""
        if self._known_fingerprint is None:
            self._known_fingerprint = self._fingerprint()
        return self._known_fingerprint

    def serves(self, saved: Fingerprint) -> bool:
        """Whether a head for the vectors of an encoder with this fingerprint serves with this encoder's, too."""
        return same_model(saved, self.fingerprint)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        if self._known_dimension is None:
            self._known_dimension = self.fingerprint.dimension
        return self._known_dimension

    def encode(
        self, texts: Sequence[str], *, progress: Callable[[Sequence[list[str]]], Any] | None = None
    ) -> "np.ndarray":
        """Unit vectors, float32 [n, d], of texts, through the cache.

        Texts with no visible character get the zero vector: they say nothing.

        Args:
            texts: Any number of strings.
            progress: Wraps the list of batches, e.g. in `tqdm`.

        Raises:
            RouteError: If the model gives values that are not finite.
        """
        import numpy as np

        found = self._in_memory(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in found and text.strip()]
        if stored := self._on_disk(missing):
            found.update(stored)
            missing = [text for text in missing if text not in stored]
        # Long texts together: a batch is padded to its longest.
        missing.sort(key=len)
        batches = [missing[start : start + GATHER_LIMIT] for start in range(0, len(missing), GATHER_LIMIT)]
        for batch in progress(batches) if progress is not None else batches:
            found.update(zip(batch, self._gathering.encode(batch), strict=True))
        zero = np.zeros(self.dimension, dtype=np.float32)
        return np.stack([found.get(text, zero) for text in texts]) if len(texts) else np.zeros((0, len(zero)), "f4")

    def encode_one(self, text: str) -> "np.ndarray":
        """Unit vector, float32 [d], of one text.

        Concurrent calls share batches, whether threads or tasks make them. There is no timer: a call that finds the
        model free is encoded at once, another when a batch in progress has ended, with others who wait. Of those the
        one that has waited longest always goes next.
        """
        if not text.strip():
            return self.encode([text])[0]
        vector = self._in_memory([text]).get(text)
        if vector is None:
            vector = self._on_disk([text]).get(text)
        return self._gathering.encode([text])[0] if vector is None else vector

    async def aencode_one(self, text: str) -> "np.ndarray":
        """`encode_one` that leaves the event loop free while the model loads and runs."""
        if not text.strip():
            return await asyncio.to_thread(self.encode_one, text)
        vector = self._in_memory([text]).get(text)
        if vector is None and self.vector_cache is not None:
            vector = (await asyncio.to_thread(self._on_disk, [text])).get(text)
        return await asyncio.wrap_future(self._gathering.submit(text)) if vector is None else vector

    def _in_memory(self, texts: Iterable[str]) -> "dict[str, np.ndarray]":
        if not self.cache_size:
            return {}
        with self._cache_lock:
            return {text: vector for text in texts if (vector := self._cache.get(text)) is not None}

    def _on_disk(self, texts: list[str]) -> "dict[str, np.ndarray]":
        if self.vector_cache is None or not texts:
            return {}
        found = self.vector_cache.get(self.fingerprint, texts)
        self._keep_in_memory(found)
        return found

    def _keep_in_memory(self, vectors: "Mapping[str, np.ndarray]") -> None:
        if self.cache_size:
            with self._cache_lock:
                self._cache.update(vectors)

    def _encode_and_keep(self, texts: list[str]) -> "np.ndarray":
        """Unit vectors of texts, put into the caches."""
        vectors = self._unit_vectors(texts)
        if self.cache_size:  # copies: a view would keep its whole batch alive
            self._keep_in_memory({text: vector.copy() for text, vector in zip(texts, vectors, strict=True)})
        if self.vector_cache is not None and self._known_fingerprint is not None:
            self.vector_cache.put(self._known_fingerprint, dict(zip(texts, vectors, strict=True)))
        return vectors

    def _unit_vectors(self, texts: list[str]) -> "np.ndarray":
        """Float32 [n, d] of texts, from the model."""
        import numpy as np

        vectors = np.array(self._encode_batch([encodable(text) for text in texts]), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise RouteError(
                f"The encoder {self!r} gave an array of shape {vectors.shape} for {len(texts)} texts; "
                f"expected ({len(texts)}, dimension)."
            )
        if not np.isfinite(vectors).all():
            bad = texts[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
            raise RouteError(
                f"The encoder {self!r} gave values that are not finite for the text {shortened(bad)!r}. "
                "Check the model's weights and its numeric precision."
            )
        self._known_dimension = vectors.shape[1]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(lengths > 0, lengths, np.float32(1))
        return vectors

    def __deepcopy__(self, memo: dict[int, Any]) -> "Encoder":
        return self


def encodable(text: str) -> str:
    """A text as UTF-8 can hold it; half of a surrogate pair becomes a question mark.

    A tokenizer refuses it, and with it all texts of the batch, whoever they are from.

    Example:
        >>> encodable("cut off " + chr(0xD83D))
        'cut off ?'
    """
    return text.encode("utf-8", "replace").decode()


def shortened(text: str, limit: int = 60) -> str:
    """A text as an error message quotes it."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def warn_of_truncation(text: str, window: int, model: str) -> None:
    """Log that a model cuts a text; encoders say it once."""
    logger.warning(
        "The text %r (%d characters) is longer than the %d word pieces %s reads; it is cut there, as every such text "
        "will be.", shortened(text), len(text), window, model,
    )  # fmt: skip


_encoders: "weakref.WeakSet[Encoder]" = weakref.WeakSet()


def _reset_after_fork() -> None:
    for encoder in _encoders:
        encoder._reset_threads()
        if encoder.vector_cache is not None:
            encoder.vector_cache.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_reset_after_fork)
