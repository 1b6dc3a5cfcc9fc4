import logging
import operator
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dspy_router import RouteError, SentenceEncoder
from dspy_router.encoders import sentence, weights
from dspy_router.encoders.batching import MOST_WORKERS, batch_of_like_lengths


def test_the_default_model_loads_without_a_network(sentence_encoder: SentenceEncoder) -> None:
    near, same, far = sentence_encoder.encode(
        ["will it rain tomorrow?", "what is the weather forecast?", "add this song to my list"]
    )
    assert near.shape == (384,)
    assert near @ same > near @ far + 0.2
    assert sentence_encoder.fingerprint.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert len(sentence_encoder.fingerprint.weights) == 64


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_torchs_threads_are_shared_between_batches_and_left_as_they_were(
    torch_threads: Callable[[int], None],
) -> None:
    torch_threads(8)
    encoder, seen = SentenceEncoder(cache_size=0), []
    encoder.transformer.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    encoder._encode_batch(["one text"])
    encoder._encode_batch([f"text {number}" for number in range(8)])
    with ThreadPoolExecutor(1) as pool:  # in a thread that is new to torch
        pool.submit(encoder._encode_batch, ["one text"]).result()
    assert torch.get_num_threads() == 8
    assert seen == [1, 8 // MOST_WORKERS, 1]


def test_batches_run_side_by_side_on_as_many_threads_as_torch_may_use(torch_threads: Callable[[int], None]) -> None:
    torch_threads(2)
    encoder = SentenceEncoder(cache_size=0)
    texts = [f"text number {number} " + "and more " * (number % 9) for number in range(120)]
    threads: set[int] = set()
    encode_batch = encoder._encode_batch
    encoder._encode_batch = lambda batch: (threads.add(threading.get_ident()), encode_batch(batch))[1]
    vectors = encoder.encode(texts)
    assert len(threads) == 2
    np.testing.assert_allclose(vectors, np.stack([encoder.encode_one(text) for text in texts]), atol=1e-5)
    threads.clear()
    torch.set_num_threads(1)
    encoder.encode(texts)
    assert len(threads) == 1


def test_twins_share_the_weights() -> None:
    encoder = SentenceEncoder()
    twin = sentence._twin(encoder.transformer)
    assert twin.tokenizer is not encoder.transformer.tokenizer
    assert all(map(operator.is_, twin.parameters(), encoder.transformer.parameters()))


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_holds_the_first_text_and_texts_of_like_length(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, size=100).tolist()
    batch = batch_of_like_lengths(lengths, most=32)
    assert 0 in batch
    assert 8 <= len(batch) <= 32
    within = sorted(lengths[index] for index in batch)
    assert within == [length for length in sorted(lengths) if within[0] <= length <= within[-1]]
    assert within[-1] - within[0] < 100


def test_a_batch_is_cut_where_padding_costs_more_than_another_batch() -> None:
    assert batch_of_like_lengths([30] * 5, most=32) == [0, 1, 2, 3, 4]
    assert batch_of_like_lengths([30] * 5, most=3)[0] == 0
    assert batch_of_like_lengths([30, 30, 1000], most=32) == [0, 1]
    assert batch_of_like_lengths([1000, 30, 30], most=32) == [0]


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
    assert restored._transformers == ()


def test_an_unknown_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RouteError, match="'nobody/no-such-model' could not be loaded"):
        SentenceEncoder("nobody/no-such-model").encode_one("hello")


def test_weights_that_are_not_the_published_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DEFAULT_WEIGHTS_FILE_SHA256", "0" * 64)
    with pytest.raises(RouteError, match="not that of the published weights"):
        sentence.offline_folder("all-MiniLM-L6-v2")
    assert sentence.offline_folder("another-model") is None
