import pickle

import dspy
import numpy as np

from dspy_router.encoders.choose import as_encoder
from dspy_router.encoders.function import FunctionEncoder
from tests.conftest import bag_of_words


def test_the_fingerprint_tells_functions_apart() -> None:
    def other(texts: list[str]) -> np.ndarray:
        return -bag_of_words(texts)

    own = FunctionEncoder(bag_of_words).fingerprint
    assert own == FunctionEncoder(bag_of_words).fingerprint
    assert (own.name, own.dimension) == ("bag_of_words", 64)
    assert own.weights != FunctionEncoder(other).fingerprint.weights


def test_a_dspy_embedder_is_an_encoder() -> None:
    encoder = as_encoder(dspy.Embedder(bag_of_words))
    np.testing.assert_allclose(encoder.encode(["a b"]), FunctionEncoder(bag_of_words).encode(["a b"]), rtol=1e-6)


def test_pickling_keeps_the_function() -> None:
    encoder = pickle.loads(pickle.dumps(FunctionEncoder(bag_of_words, cache_size=3)))
    assert encoder.cache_size == 3
    assert encoder.encode_one("a").shape == (64,)
