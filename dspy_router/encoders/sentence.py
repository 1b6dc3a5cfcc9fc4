"""The default encoder: a sentence-transformers model, frozen."""

import copy
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_router.encoders.base import Encoder, Fingerprint, warn_of_truncation
from dspy_router.encoders.batching import MOST_WORKERS, batch_of_like_lengths
from dspy_router.encoders.cache import VectorCache
from dspy_router.encoders.weights import DEFAULT_MODEL, offline_folder
from dspy_router.errors import RouteError
from dspy_router.threads import at_most_threads

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

SINGLE_THREAD_TEXTS = 4  # up to this many texts are small work


class SentenceEncoder(Encoder):
    """Frozen sentence embeddings from any sentence-transformers model.

    The default model needs no network when the extra `dspy-router[offline]` is installed: the weights then
    come from that package, checked by hash. Any other model comes from a folder or from the model hub. The
    model is loaded at first use. A text longer than the model's window (256 word pieces for the default)
    is cut there, which is logged once.

    Pickling, and so `save(..., save_program=True)`, keeps the settings and leaves the weights out.

    Args:
        model: Name or folder of a sentence-transformers model.
        revision: The model's revision on the hub.
        device: A torch device such as `"cuda"`; the CPU by default.
        batch_size: Texts the model takes at once.
        cache_size: How many texts' vectors are kept in memory.
        vector_cache: A file of vectors that other runs and processes share; see `Encoder`.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        cache_size: int = 20_000,
        vector_cache: VectorCache | str | Path | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size, vector_cache=vector_cache)
        self.model = model
        self.revision = revision
        self.device = device
        self.batch_size = batch_size

    def _reset_runtime(self) -> None:
        self._transformers: tuple[SentenceTransformer, ...] = ()
        super()._reset_runtime()
        self._told_of_truncation = False

    def _reset_threads(self) -> None:
        super()._reset_threads()
        self._load_lock = threading.Lock()
        self._free = list(self._transformers)  # those that no batch is using, the original last

    @property
    def transformer(self) -> "SentenceTransformer":
        """The sentence-transformers model, loaded at first use."""
        if not self._transformers:
            with self._load_lock:
                if not self._transformers:
                    transformer = self._load()
                    self._free = [*(_twin(transformer) for _ in range(self._batches_at_once() - 1)), transformer]
                    self._transformers = tuple(self._free)
        return self._transformers[-1]

    def _load(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        folder = offline_folder(self.model) if self.revision is None else None
        try:
            transformer = SentenceTransformer(
                str(folder or self.model), revision=self.revision, device=self.device, local_files_only=bool(folder)
            )
        except OSError as error:
            raise RouteError(
                f"The sentence-transformers model {self.model!r} could not be loaded: {error}\n"
                "Give a folder or a name on the model hub; without a network, the default model comes with "
                "pip install 'dspy-router[offline]'."
            ) from error
        transformer.eval().requires_grad_(False)
        return transformer

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        import torch

        self.transformer  # noqa: B018  (loads it)
        transformer = self._free.pop()
        threads = 1 if len(texts) <= SINGLE_THREAD_TEXTS else torch.get_num_threads() // self._workers()
        try:
            self._tell_of_truncation(transformer, texts)
            with at_most_threads(threads):
                vectors: np.ndarray = transformer.encode(
                    texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True
                )
        finally:
            self._free.append(transformer)
        return vectors

    def _workers(self) -> int:
        return min(len(self._transformers), self._batches_at_once()) if self._transformers else 1

    def _batches_at_once(self) -> int:
        """Side by side, batches of one thread each share cores better than one batch of as many threads."""
        import torch

        return min(torch.get_num_threads(), MOST_WORKERS) if self.device == "cpu" else 1

    def _choose(self, texts: list[str]) -> Sequence[int]:
        if self.device != "cpu":
            return super()._choose(texts)
        return batch_of_like_lengths([len(text) for text in texts], self.batch_size)

    def _tell_of_truncation(self, transformer: "SentenceTransformer", texts: list[str]) -> None:
        window = transformer.max_seq_length
        if self._told_of_truncation or not window:
            return
        # A word piece is at least one character, so shorter texts fit.
        for text in texts:
            if len(text) > window and len(transformer.tokenizer.tokenize(text)) > window - 2:
                self._told_of_truncation = True
                warn_of_truncation(text, window, self.model)
                return

    def _fingerprint(self) -> Fingerprint:
        transformer = self.transformer
        digest = hashlib.sha256()
        for name, tensor in sorted(transformer.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return Fingerprint(
            self.model, self.revision or "", digest.hexdigest(), int(transformer.get_embedding_dimension() or 0)
        )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "revision", "device", "batch_size", "cache_size", "vector_cache")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.model!r})"


def _twin(transformer: "SentenceTransformer") -> "SentenceTransformer":
    """A copy with the same weights and a tokenizer of its own: threads cannot share a tokenizer."""
    shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    return copy.deepcopy(transformer, shared)
