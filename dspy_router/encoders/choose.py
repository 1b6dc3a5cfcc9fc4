"""From what a user passes as `encoder=` to an encoder."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from dspy_router.encoders.base import Encoder
from dspy_router.encoders.function import FunctionEncoder
from dspy_router.encoders.onnx import OnnxEncoder
from dspy_router.encoders.sentence import SentenceEncoder
from dspy_router.encoders.static import StaticEncoder
from dspy_router.encoders.token import TokenEncoder
from dspy_router.errors import RouteError


@lru_cache(maxsize=1)
def default_encoder() -> SentenceEncoder:
    """The process-wide default encoder, shared by every route that names none."""
    return SentenceEncoder()


def as_encoder(encoder: Any = None) -> Encoder:
    """An `Encoder` as it is; a model's name, a callable or a `dspy.Embedder` wrapped; None for the default.

    Raises:
        RouteError: If it is none of these.
    """
    if encoder is None:
        return default_encoder()
    if isinstance(encoder, Encoder):
        return encoder
    if isinstance(encoder, str):
        return SentenceEncoder(encoder)
    if callable(encoder):
        return FunctionEncoder(encoder)
    raise RouteError(
        f"encoder={encoder!r} is no encoder. Give a sentence-transformers model's name, a SentenceEncoder, "
        "OnnxEncoder, StaticEncoder or TokenEncoder, a dspy.Embedder, or a callable from a list of strings to an array."
    )


def encoder_settings(encoder: Encoder) -> dict[str, Any] | None:
    """What `encoder_from_settings` makes an equal encoder from, JSON-compatible; None where a callable is needed."""
    if isinstance(encoder, SentenceEncoder):
        return {"kind": "sentence", "model": encoder.model, "revision": encoder.revision}
    if isinstance(encoder, OnnxEncoder):
        return {"kind": "onnx", "model": encoder.model, "arithmetic": encoder.arithmetic}
    if isinstance(encoder, StaticEncoder):
        return {"kind": "static", "folder": encoder.folder}
    if isinstance(encoder, TokenEncoder):
        return {
            "kind": "token",
            "dimension": encoder.size,
            "layer": encoder.layer,
            "vocabulary": encoder.vocabulary,
            "max_tokens": encoder.max_tokens,
            "seed": encoder.seed,
        }
    return None


def encoder_from_settings(settings: Mapping[str, Any]) -> Encoder:
    """The encoder that settings describe; frozen ones are shared.

    Raises:
        RouteError: If they describe none.
    """
    given = dict(settings)
    kind = given.pop("kind", None)
    try:
        if kind == "sentence":
            return _shared_sentence_encoder(**given)
        if kind in _SHARED:
            return _shared(kind, **given)
        if kind == "token":
            return TokenEncoder(**given)
    except TypeError as error:
        raise RouteError(f"The encoder's saved settings are damaged: {settings}. Save the program again.") from error
    raise RouteError(f"The encoder's saved settings {settings} are of no known kind. Save the program again.")


_SHARED: dict[str, Callable[..., Encoder]] = {"onnx": OnnxEncoder, "static": StaticEncoder}


@lru_cache(maxsize=8)
def _shared(kind: str, **settings: str) -> Encoder:
    return _SHARED[kind](**settings)


@lru_cache(maxsize=8)
def _shared_sentence_encoder(model: str, revision: str | None) -> SentenceEncoder:
    default = default_encoder()
    return (
        default if (model, revision) == (default.model, default.revision) else SentenceEncoder(model, revision=revision)
    )
