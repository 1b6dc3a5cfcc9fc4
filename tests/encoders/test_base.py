import asyncio
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dspy_router import RouteError
from dspy_router.encoders.base import GATHER_LIMIT
from dspy_router.encoders.choose import as_encoder, default_encoder
from dspy_router.encoders.function import FunctionEncoder
from tests.conftest import bag_of_words


class Counting:
    """An encoder function that remembers its batches and may take its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[str]] = []
        self.seconds = seconds
        self.running = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.running += 1
        assert self.running == 1, "two threads in the model at once"
        time.sleep(self.seconds)
        self.batches.append(texts)
        self.running -= 1
        return bag_of_words(texts)


def test_vectors_have_unit_length_and_keep_the_order() -> None:
    texts = ["a longer text of words", "b", "a longer text of words", "c d"]
    vectors = FunctionEncoder(bag_of_words).encode(texts)
    assert (vectors.shape, vectors.dtype) == ((4, 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, FunctionEncoder(bag_of_words).encode_one(text), rtol=1e-5)


def test_no_texts_give_no_vectors() -> None:
    assert FunctionEncoder(bag_of_words).encode([]).shape == (0, 64)


def test_empty_text_is_the_zero_vector() -> None:
    encoder = FunctionEncoder(bag_of_words)
    assert not encoder.encode(["", " \n"]).any()
    assert not encoder.encode_one("  ").any()


def test_each_text_is_encoded_once_while_the_cache_holds_it() -> None:
    function = Counting()
    encoder = FunctionEncoder(function, cache_size=2)
    encoder.encode(["a", "b", "a"])
    encoder.encode(["a", "b"])
    assert encoder.encode_one("a") is not None
    assert function.batches == [["a", "b"]]
    encoder.encode(["c"])  # turns out the least recently used
    encoder.encode(["b"])
    assert function.batches[1:] == [["c"], ["b"]]


def test_without_a_cache_every_call_encodes() -> None:
    function = Counting()
    encoder = FunctionEncoder(function, cache_size=0)
    encoder.encode_one("a")
    encoder.encode_one("a")
    assert function.batches == [["a"], ["a"]]
    with pytest.raises(RouteError, match="cache_size=-1 is negative"):
        FunctionEncoder(function, cache_size=-1)


def test_threads_that_wait_share_batches_and_get_their_own_vectors() -> None:
    function = Counting(seconds=0.02)
    encoder = FunctionEncoder(function)
    texts = [f"text number {number}" for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        vectors = list(pool.map(encoder.encode_one, texts))
    np.testing.assert_allclose(np.stack(vectors), FunctionEncoder(bag_of_words).encode(texts), rtol=1e-5)
    assert len(function.batches) < 20
    assert sorted(text for batch in function.batches for text in batch) == sorted(texts)


def test_an_error_reaches_every_caller_and_the_encoder_goes_on() -> None:
    def failing(texts: list[str]) -> np.ndarray:
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return bag_of_words(texts)

    encoder = FunctionEncoder(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder.encode_one("bad")
    assert encoder.encode_one("good").any()


def test_an_error_reaches_all_who_share_the_batch_and_nobody_else() -> None:
    batches: list[list[str]] = []

    def failing_once(texts: list[str]) -> np.ndarray:
        batches.append(texts)
        time.sleep(0.1)
        if len(batches) == 2:
            raise RuntimeError("out of memory")
        return bag_of_words(texts)

    encoder = FunctionEncoder(failing_once)

    async def run() -> list[object]:
        first = asyncio.ensure_future(encoder.aencode_one("first"))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(encoder.aencode_one(f"other {number}")) for number in range(5)]
        await asyncio.sleep(0.1)
        last = asyncio.ensure_future(encoder.aencode_one("last"))
        return await asyncio.gather(first, *others, last, return_exceptions=True)

    first, *others, last = asyncio.run(run())
    assert [len(batch) for batch in batches] == [1, 5, 1]
    assert isinstance(first, np.ndarray)
    assert all(str(error) == "out of memory" for error in others)
    assert isinstance(last, np.ndarray)


def test_a_lone_call_runs_in_its_own_thread_and_no_thread_is_left() -> None:
    seen: list[threading.Thread] = []

    def function(texts: list[str]) -> np.ndarray:
        seen.append(threading.current_thread())
        return bag_of_words(texts)

    encoder = FunctionEncoder(function)
    encoder.encode_one("from a thread")
    asyncio.run(encoder.aencode_one("from a task"))
    assert seen[0] is threading.current_thread()
    assert seen[1] is not threading.current_thread()
    seen[1].join(1)
    assert not seen[1].is_alive()


def test_the_call_that_has_waited_longest_is_in_the_next_batch() -> None:
    class OneByOne(FunctionEncoder):
        def _choose(self, texts: list[str]) -> list[int]:
            return [0]

    function = Counting(seconds=0.01)
    encoder = OneByOne(function)

    async def run() -> None:
        await asyncio.gather(*(encoder.aencode_one(f"text {number}") for number in range(20)))

    asyncio.run(run())
    assert function.batches == [[f"text {number}"] for number in range(20)]


def test_a_call_is_not_kept_waiting_by_a_long_list() -> None:
    encoder = FunctionEncoder(Counting(seconds=0.05))
    with ThreadPoolExecutor(1) as pool:
        listed = pool.submit(encoder.encode, [f"text {number}" for number in range(20 * GATHER_LIMIT)])
        time.sleep(0.2)
        encoder.encode_one("in between")
        assert not listed.done()
    assert len(listed.result()) == 20 * GATHER_LIMIT


def test_async_callers_do_not_block_the_event_loop() -> None:
    encoder = FunctionEncoder(Counting(seconds=0.2))

    async def run() -> tuple[list[np.ndarray], float]:
        tasks = [asyncio.create_task(encoder.aencode_one(f"text {number}")) for number in range(20)]
        longest = 0.0
        while not all(task.done() for task in tasks):
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - started)
        return [task.result() for task in tasks], longest

    vectors, longest = asyncio.run(run())
    assert longest < 0.15
    np.testing.assert_allclose(
        np.stack(vectors), FunctionEncoder(bag_of_words).encode([f"text {number}" for number in range(20)]), rtol=1e-5
    )


def test_a_cancelled_task_does_not_disturb_the_others() -> None:
    encoder = FunctionEncoder(Counting(seconds=0.1))

    async def run() -> np.ndarray:
        first = asyncio.create_task(encoder.aencode_one("first"))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(encoder.aencode_one("gone"))
        other = asyncio.create_task(encoder.aencode_one("other"))
        await asyncio.sleep(0.02)
        gone.cancel()
        await first
        return await other

    np.testing.assert_allclose(asyncio.run(run()), FunctionEncoder(bag_of_words).encode_one("other"), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: np.full((len(texts), 4), np.nan), "not finite for the text 'hello'"),
        (lambda texts: np.ones(4), r"shape \(4,\) for 1 texts"),
        (lambda texts: np.ones((3, 4)), r"shape \(3, 4\) for 1 texts"),
        (lambda texts: "vector", "failed on a list of 1 strings"),
    ],
)
def test_unusable_vectors_are_named(function: object, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        as_encoder(function).encode_one("hello")


def test_an_encoder_is_shared_not_copied() -> None:
    encoder = FunctionEncoder(bag_of_words)
    assert copy.deepcopy({"a": encoder})["a"] is encoder
    assert as_encoder() is as_encoder(None) is default_encoder()
    assert as_encoder(encoder) is encoder
    with pytest.raises(RouteError, match="encoder=3 is no encoder"):
        as_encoder(3)


def test_many_threads_may_ask_for_the_same_text() -> None:
    function = Counting(seconds=0.01)
    encoder = FunctionEncoder(function)
    barrier = threading.Barrier(16)

    def ask(_: int) -> np.ndarray:
        barrier.wait()
        return encoder.encode_one("same")

    with ThreadPoolExecutor(16) as pool:
        vectors = list(pool.map(ask, range(16)))
    assert all(np.array_equal(vector, vectors[0]) for vector in vectors)


def test_half_a_surrogate_pair_does_not_fail_the_batch_it_is_in() -> None:
    def strict(texts: list[str]) -> np.ndarray:
        for text in texts:
            text.encode()
        return bag_of_words(texts)

    encoder = FunctionEncoder(strict)
    vectors = encoder.encode(["rain in Oslo", "rain \ud83c in Oslo"])
    np.testing.assert_array_equal(vectors[0], FunctionEncoder(strict).encode_one("rain in Oslo"))
    np.testing.assert_array_equal(vectors[1], FunctionEncoder(strict).encode_one("rain ? in Oslo"))
