"""A routed program under everything DSPy and asyncio call it with, with the real encoder."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import dspy
import numpy as np
import pytest

from dspy_router import DifferentiableRoute, SentenceEncoder
from tests.programs import FRUIT


class Shop(dspy.Module):
    """A program around a route, with both faces."""

    def __init__(self, encoder: object = None) -> None:
        super().__init__()
        self.clerk = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=encoder)

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=self.clerk(request=request).fruit)

    async def aforward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=(await self.clerk.acall(request=request)).fruit)


def requests(name: str, count: int = 64) -> list[str]:
    """Requests of different lengths that no other test has encoded."""
    return [f"{name} {number}: " + f"{FRUIT[number % 3]} " * (1 + number % 7) for number in range(count)]


OneByOne = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def one_by_one() -> OneByOne:
    """Decisions of a route that nobody else calls."""
    program = Shop(SentenceEncoder())
    return lambda texts: [program(request=text).fruit for text in texts]


async def all_at_once(program: Shop, texts: list[str]) -> list[str]:
    predictions = await asyncio.gather(*(program.acall(request=text) for text in texts))
    return [prediction.fruit for prediction in predictions]


def test_evaluate_with_32_threads_decides_as_one_call_after_the_other(one_by_one: OneByOne) -> None:
    texts = requests("evaluate")
    devset = [dspy.Example(request=text).with_inputs("request") for text in texts]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda example, prediction, trace=None: 1, num_threads=32)
    results = evaluate(Shop()).results
    assert [prediction.fruit for _, prediction, _ in results] == one_by_one(texts)


def test_parallel_decides_as_one_call_after_the_other(one_by_one: OneByOne) -> None:
    texts, program = requests("parallel"), Shop()
    pairs = [(program, {"request": text}) for text in texts]
    predictions = dspy.Parallel(num_threads=32, disable_progress_bar=True)(pairs)
    assert [prediction.fruit for prediction in predictions] == one_by_one(texts)


def test_200_tasks_decide_as_one_call_after_the_other(one_by_one: OneByOne) -> None:
    texts = requests("tasks", 200)
    assert asyncio.run(all_at_once(Shop(), texts)) == one_by_one(texts)


def test_asyncify_decides_as_one_call_after_the_other(one_by_one: OneByOne) -> None:
    texts, program = requests("asyncify"), dspy.asyncify(Shop())

    async def run() -> list[dspy.Prediction]:
        return await asyncio.gather(*(program(request=text) for text in texts))

    assert [prediction.fruit for prediction in asyncio.run(run())] == one_by_one(texts)


@pytest.mark.parametrize("is_async_program", [False, True])
def test_streamify_ends_with_the_decision(is_async_program: bool, one_by_one: OneByOne) -> None:
    texts = requests(f"streamify {is_async_program}", 20)
    program = dspy.streamify(Shop(), is_async_program=is_async_program)

    async def last(stream: AsyncIterator[object]) -> object:
        return [item async for item in stream][-1]

    async def run() -> list[object]:
        return await asyncio.gather(*(last(program(request=text)) for text in texts))

    assert [prediction.fruit for prediction in asyncio.run(run())] == one_by_one(texts)


def test_the_event_loop_goes_on_while_tasks_decide() -> None:
    program = Shop()
    program(request="the first call loads the model")

    async def run() -> list[float]:
        late: list[float] = []
        deciding = asyncio.ensure_future(all_at_once(program, requests("loop", 200)))
        while not deciding.done():
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - started - 0.001)
        await deciding
        return late

    late = asyncio.run(run())
    assert len(late) > 50
    # The benchmark holds it to 10 ms; here other tests may be running, and one blocking batch would take 50 and more.
    assert np.percentile(late, 95) < 0.03


def test_the_first_call_of_a_route_builds_its_head_outside_the_event_loop(sentence_encoder: SentenceEncoder) -> None:
    program = Shop(sentence_encoder)
    slow = [f"option {number}" for number in range(300)]
    program.clerk = DifferentiableRoute("request -> fruit", tools=slow, encoder=sentence_encoder)
    sentence_encoder.encode_one("loads the model")

    async def run() -> float:
        longest, deciding = 0.0, asyncio.ensure_future(program.acall(request="first call"))
        while not deciding.done():
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - started)
        await deciding
        return longest

    started = time.perf_counter()
    longest = asyncio.run(run())
    assert longest < 0.5 * (time.perf_counter() - started)


def test_a_cancelled_task_among_200_disturbs_no_other(one_by_one: OneByOne) -> None:
    texts, program = requests("cancelled", 200), Shop()

    async def run() -> list[object]:
        tasks = [asyncio.ensure_future(program.acall(request=text)) for text in texts]
        await asyncio.sleep(0.05)
        for number in (3, 150, 199):
            tasks[number].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert isinstance(found[199], asyncio.CancelledError)
    assert sum(isinstance(prediction, dspy.Prediction) for prediction in found) >= 197
    kept = slice(160, 190)
    assert [prediction.fruit for prediction in found[kept]] == one_by_one(texts[kept])


def test_event_loops_may_follow_one_another_and_be_left_in_the_middle(one_by_one: OneByOne) -> None:
    program = Shop()
    for number in range(3):
        texts = requests(f"loop {number}", 20)
        assert asyncio.run(all_at_once(program, texts)) == one_by_one(texts)
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(all_at_once(program, requests(f"left {number}", 50)), 0.01))


def test_two_event_loops_and_threads_share_a_route(one_by_one: OneByOne) -> None:
    texts, program = requests("two loops"), Shop()
    parts = [texts[start::4] for start in range(4)]

    def in_a_loop(part: list[str]) -> list[str]:
        return asyncio.run(all_at_once(program, part))

    def in_a_thread(part: list[str]) -> list[str]:
        return [program(request=text).fruit for text in part]

    with ThreadPoolExecutor(4) as pool:
        ways = [in_a_loop, in_a_loop, in_a_thread, in_a_thread]
        running = [pool.submit(way, part) for way, part in zip(ways, parts, strict=True)]
    assert [future.result() for future in running] == [one_by_one(part) for part in parts]


def test_a_forked_child_decides_even_if_the_model_was_at_work() -> None:
    program = Shop()
    texts = requests("fork", 60)
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(program, request=text) for text in texts]
        busy[0].result()
        child = os.fork()
        if child == 0:
            right = [program(request=f"{fruit} after the fork").fruit == fruit for fruit in FRUIT]
            os._exit(0 if all(right) else 1)
        assert all(future.result().fruit in FRUIT for future in busy)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended[0] == 0:
        os.kill(child, 9)
    assert ended == (child, 0)
