"""Static embeddings: a text is the mean of its word pieces' fixed vectors, looked up in microseconds."""

import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_router.encoders.base import Encoder, Fingerprint
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np
    from model2vec import StaticModel


class StaticEncoder(Encoder):
    """Static embeddings of model2vec as an encoder; needs the extra `dspy-router[static]`.

    No network runs at all, so word order is lost and a word means the same everywhere. In exchange a text takes some
    tens of microseconds. `python -m dspy_router.encoders.distill FOLDER` makes one from the default model, offline;
    `python benchmarks/speed.py` prints what it costs in accuracy.

    Args:
        folder: Of a model2vec model: its `model.safetensors`, `tokenizer.json` and `config.json`.
        cache_size: How many texts' vectors are kept in memory. None by default: looking one up is hardly faster.

    Raises:
        RouteError: At first use, if model2vec or the model is not there.
    """

    def __init__(self, folder: str | Path, *, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.folder = str(folder)

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._loaded: StaticModel | None = None

    def _reset_threads(self) -> None:
        super()._reset_threads()
        self._load_lock = threading.Lock()

    @property
    def static_model(self) -> "StaticModel":
        """The model2vec model, loaded at first use."""
        if self._loaded is None:
            with self._load_lock:
                if self._loaded is None:
                    self._loaded = _load(self.folder)
        return self._loaded

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        return self.static_model.encode(texts, use_multiprocessing=False)

    def _fingerprint(self) -> Fingerprint:
        model = self.static_model
        tokens = "\n".join(model.tokens).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(model.embedding.tobytes() + tokens).hexdigest()
        return Fingerprint(f"model2vec:{model.base_model_name or Path(self.folder).name}", "", digest, model.dim)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "cache_size": self.cache_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"StaticEncoder({self.folder!r})"


def _load(folder: str) -> "StaticModel":
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise RouteError(
            f"StaticEncoder needs model2vec, which cannot be imported ({error}). Install it with "
            "pip install 'dspy-router[static]'."
        ) from error
    if not Path(folder, "model.safetensors").is_file():
        raise RouteError(
            f"folder={folder!r} holds no model.safetensors. python -m dspy_router.encoders.distill {folder} makes a "
            "static model there from the default one."
        )
    return StaticModel.from_pretrained(folder)
