"""Any callable from texts to vectors as an encoder, `dspy.Embedder` included."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_router.encoders.base import Encoder, Fingerprint
from dspy_router.encoders.cache import VectorCache
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np

PROBE = "the quick brown fox jumps over the lazy dog"


class FunctionEncoder(Encoder):
    """A callable `list[str] -> array [n, d]` as an encoder; the vectors are scaled to unit length here.

    Its fingerprint is the callable's name and a digest of the vector it gives for a fixed text, to two
    decimals. Saving a program as a whole (`save_program=True`) pickles the callable.

    Args:
        function: The callable, e.g. a `dspy.Embedder` or a model's `encode`.
        cache_size: How many texts' vectors are kept in memory.
        vector_cache: A file of vectors that other runs share, see `Encoder`. It goes by the fingerprint, so give each
            function its own file if several have one name and nearly the same vectors.
    """

    def __init__(
        self,
        function: Callable[[list[str]], Any],
        *,
        cache_size: int = 20_000,
        vector_cache: VectorCache | str | Path | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size, vector_cache=vector_cache)
        self.function = function

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        import numpy as np

        try:
            return np.asarray(self.function(texts), dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise RouteError(
                f"The encoder {self!r} failed on a list of {len(texts)} strings: {error}. "
                "An encoder takes a list of strings and returns an array of one row a string."
            ) from error

    def _fingerprint(self) -> Fingerprint:
        (vector,) = self._gathering.encode([PROBE])  # not looked up on disk, which goes by the fingerprint
        # Adding 0.0 turns a rounded -0.0 into 0.0, which has other bytes.
        digest = hashlib.sha256((vector.round(2) + 0.0).tobytes()).hexdigest()
        return Fingerprint(self.name, "", digest, len(vector))

    @property
    def name(self) -> str:
        """The callable's, or that of the model it says it uses."""
        model = getattr(self.function, "model", None)
        if isinstance(model, str):
            return model
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "cache_size": self.cache_size, "vector_cache": self.vector_cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"FunctionEncoder({self.name})"
