import copy
import pickle

import numpy as np
import pytest
import torch

from dspy_router import RouteError, TokenEncoder


@pytest.mark.parametrize("layer", ["gru", "attention"])
def test_vectors_are_repeatable_unit_vectors(layer: str) -> None:
    texts = ["play some jazz", "", "A completely different, longer request!"]
    vectors = TokenEncoder(32, layer=layer).encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1], rtol=1e-5)
    np.testing.assert_array_equal(vectors, TokenEncoder(32, layer=layer).encode(texts))
    alone = TokenEncoder(32, layer=layer).encode(texts[:1])
    np.testing.assert_allclose(alone[0], vectors[0], atol=1e-5)


def test_a_text_without_a_token_does_not_spoil_its_batch() -> None:
    for layer in ("gru", "attention"):
        vectors = TokenEncoder(32, layer=layer).encode(["\u200b", "play some jazz"])
        assert np.isfinite(vectors).all()


def test_token_ids_are_hashed_cut_and_padded() -> None:
    encoder = TokenEncoder(32, max_tokens=3, vocabulary=100)
    ids = encoder.token_ids(["Play, play it now", "it"])
    assert ids.shape == (2, 3)
    assert ids[0, 0] == ids[0, 2] != ids[0, 1]
    assert ids[1].tolist()[1:] == [0, 0]
    assert 0 < int(ids[ids > 0].min()) <= int(ids.max()) < 100


def test_deepcopy_and_pickle_keep_the_weights_apart() -> None:
    encoder = TokenEncoder(32)
    before = encoder.encode(["a text"])
    copies = [copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))]
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.add_(0.5)
    assert not np.allclose(before, encoder.encode(["a text"]))
    for copied in copies:
        np.testing.assert_array_equal(before, copied.encode(["a text"]))


@pytest.mark.parametrize(("settings", "message"), [({"layer": "lstm"}, "'lstm' is unknown"), ({"dimension": 30}, "30")])
def test_unusable_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        TokenEncoder(**settings)
