import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dspy_router import RouteError, SentenceEncoder
from dspy_router.encoders import sentence
from dspy_router.encoders.choose import default_encoder


def test_the_default_model_loads_without_a_network(sentence_encoder: SentenceEncoder) -> None:
    near, same, far = sentence_encoder.encode(
        ["will it rain tomorrow?", "what is the weather forecast?", "add this song to my list"]
    )
    assert near.shape == (384,)
    assert near @ same > near @ far + 0.2
    assert sentence_encoder.fingerprint.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert len(sentence_encoder.fingerprint.weights) == 64


def test_a_single_text_uses_one_thread_and_leaves_torch_as_it_was(sentence_encoder: SentenceEncoder) -> None:
    seen = []
    transformer = sentence_encoder.transformer
    handle = transformer.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sentence_encoder._encode_batch(["one text"])
        sentence_encoder._encode_batch([f"text {number}" for number in range(40)])
        assert torch.get_num_threads() == 2
    finally:
        handle.remove()
        torch.set_num_threads(before)
    assert (seen[0], seen[-1]) == (1, 2)


def test_a_single_text_uses_one_core_after_torchs_threads_were_set(sentence_encoder: SentenceEncoder) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # from here on MKL does not follow OpenMP's limit
    try:
        sentence_encoder._encode_batch(["warm up"])
        everywhere, here = time.process_time(), time.thread_time()
        for number in range(20):
            sentence_encoder._encode_batch([f"text {number}"])
        everywhere, here = time.process_time() - everywhere, time.thread_time() - here
    finally:
        torch.set_num_threads(before)
    assert everywhere < 1.5 * here


def test_threads_share_the_tokenizer(sentence_encoder: SentenceEncoder) -> None:
    texts = [f"unheard request number {number}" for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        vectors = np.stack(list(pool.map(sentence_encoder.encode_one, texts)))
    single = np.stack([sentence_encoder._encode_batch([text])[0] for text in texts])
    np.testing.assert_allclose(vectors, single / np.linalg.norm(single, axis=1, keepdims=True), atol=1e-5)


def test_a_very_long_text_is_cut_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = SentenceEncoder()
    encoder._transformer = default_encoder().transformer
    long = "rain in Oslo " * 8000
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        first = encoder.encode_one(long)
        encoder.encode_one(long + "again")
    assert np.isfinite(first).all()
    messages = [record.getMessage() for record in caplog.records if "is cut there" in record.getMessage()]
    assert len(messages) == 1
    assert "104000 characters" in messages[0]
    assert "256 word pieces" in messages[0]


def test_pickling_leaves_the_weights_out(sentence_encoder: SentenceEncoder) -> None:
    data = pickle.dumps(sentence_encoder)
    assert len(data) < 1000
    restored = pickle.loads(data)
    assert restored.model == sentence_encoder.model
    assert restored._transformer is None


def test_an_unknown_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RouteError, match="'nobody/no-such-model' could not be loaded"):
        SentenceEncoder("nobody/no-such-model").encode_one("hello")


def test_weights_that_are_not_the_published_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence, "DEFAULT_WEIGHTS_FILE_SHA256", "0" * 64)
    with pytest.raises(RouteError, match="not that of the published weights"):
        sentence.offline_folder("all-MiniLM-L6-v2")
    assert sentence.offline_folder("another-model") is None
