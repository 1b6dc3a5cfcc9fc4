"""From what a user passes as `encoder=` to an encoder."""

from functools import lru_cache
from typing import Any

from dspy_router.encoders.base import Encoder
from dspy_router.encoders.function import FunctionEncoder
from dspy_router.encoders.sentence import SentenceEncoder
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
        f"encoder={encoder!r} is no encoder. Give a sentence-transformers model's name, a SentenceEncoder, a "
        "TokenEncoder, a dspy.Embedder, or a callable from a list of strings to an array."
    )
