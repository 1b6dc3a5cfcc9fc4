"""A routed program in `dspy.Evaluate`'s threads and in tasks of an event loop.

    python benchmarks/concurrency.py

Every text is new to the encoder, which keeps no vectors here. What is compared is measured in turns, and the ratios
are taken round by round: the machine's own speed cancels out. All of it runs with one torch thread and with as many
as torch takes by itself. The program decides among CLINC150's 150 intents; the requests are SNIPS's.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import dspy
import numpy as np
import torch
from common import print_table, quartiles, read
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, SentenceEncoder

ROUNDS = 7
EVALUATED = 500  # texts of an evaluation
THREADS = 32
TASKS = 200
LONE = 50  # texts of a round for the time of a lone call
HEADERS = ("torch threads", "what", "rounds", "figure", "median (quartiles)")


class CountingEncoder(SentenceEncoder):
    """The default encoder, counting its batches."""

    batches = 0

    def _encode_batch(self, texts: list[str]) -> np.ndarray:
        self.batches += 1
        return super()._encode_batch(texts)


class Desk(dspy.Module):
    """A small program around a route."""

    def __init__(self, route: DifferentiableRoute) -> None:
        super().__init__()
        self.route = route

    def forward(self, text: str) -> dspy.Prediction:
        """The decision of a text."""
        return dspy.Prediction(intent=self.route(text=text).intent)

    async def aforward(self, text: str) -> dspy.Prediction:
        """The same in a task."""
        return dspy.Prediction(intent=(await self.route.acall(text=text)).intent)


class Constant(dspy.Module):
    """A program that does nothing: what is left is DSPy's own time."""

    def forward(self, text: str) -> dspy.Prediction:
        """Nothing decided."""
        return dspy.Prediction(intent="")


def main() -> None:
    """Measure and print the table."""
    texts = sorted({row.text for row in read("snips", "train")})
    random.Random(0).shuffle(texts)
    own, lines = torch.get_num_threads(), []
    for threads in sorted({1, own}):
        torch.set_num_threads(threads)
        encoder = CountingEncoder(cache_size=0)
        intents = sorted({row.label for row in read("clinc150", "train")})
        program = Desk(DifferentiableRoute("text -> intent", tools=intents, encoder=encoder))
        program(text="warm up")
        measured = [*evaluation(program, encoder, iter(texts)), *tasks(program, encoder, iter(texts))]
        measured += lone_calls(program, encoder, iter(texts))
        lines += [[f"{threads}", *line] for line in measured]
    print_table("A route among 150 intents, called concurrently", HEADERS, lines)


def evaluation(program: Desk, encoder: CountingEncoder, texts: Any) -> list[list[str]]:
    """`dspy.Evaluate` against the encoder's own throughput on the same texts in one call."""
    alone, evaluated, nothing, batches = [], [], [], []
    for number in tqdm(range(ROUNDS), desc="evaluations", unit="round"):
        part = take(texts, EVALUATED)

        def encode(part: list[str] = part) -> None:
            alone.append(timed(lambda: encoder.transformer.encode(part, show_progress_bar=False)))

        def evaluate(part: list[str] = part) -> None:
            encoder.batches = 0
            evaluated.append(timed(lambda: evaluate_in_threads(program, part)))
            batches.append(encoder.batches)

        for run in (encode, evaluate) if number % 2 else (evaluate, encode):
            run()
        nothing.append(timed(lambda part=part: evaluate_in_threads(Constant(), part)))
    what = f"dspy.Evaluate, {THREADS} threads, {EVALUATED} texts"
    return [
        [what, f"{ROUNDS}", "calls/s to SentenceTransformer.encode's texts/s", of(np.divide(alone, evaluated), 2)],
        [what, f"{ROUNDS}", "encoder batches", of(batches)],
        [what, f"{ROUNDS}", "the time of a program that does nothing, to this", of(np.divide(nothing, evaluated), 3)],
    ]


def tasks(program: Desk, encoder: CountingEncoder, texts: Any) -> list[list[str]]:
    """How late the event loop is while tasks decide, and while as many only sleep."""
    busy, idle, longest, batches = [], [], [], []
    for _ in tqdm(range(ROUNDS), desc="tasks", unit="round"):
        part = take(texts, TASKS)
        encoder.batches = 0
        late = asyncio.run(lateness([lambda text=text: program.acall(text=text) for text in part]))
        batches.append(encoder.batches)
        busy.append(np.percentile(late, 99))
        longest.append(max(late))
        idle.append(np.percentile(asyncio.run(lateness([lambda: asyncio.sleep(1.0)] * TASKS)), 99))
    what = f"{TASKS} tasks in one event loop"
    return [
        [what, f"{ROUNDS}", "99th percentile of the loop's delay, ms", of(busy, 1)],
        [what, f"{ROUNDS}", "longest delay, ms (200 calls begin at once)", of(longest, 1)],
        [what, f"{ROUNDS}", "encoder batches", of(batches)],
        [f"{TASKS} tasks that sleep", f"{ROUNDS}", "99th percentile of the loop's delay, ms", of(idle, 1)],
    ]


def lone_calls(program: Desk, encoder: CountingEncoder, texts: Any) -> list[list[str]]:
    """What a call costs that nobody else shares the encoder with, to the encoder without the gathering of calls."""
    ways: dict[str, Callable[[str], Any]] = {
        "the encoder alone": lambda text: encoder._encode_batch([text]),
        "encode_one": encoder.encode_one,
        "program(...)": lambda text: program(text=text),
    }
    waited: dict[str, Callable[[str], Any]] = {
        "await aencode_one": encoder.aencode_one,
        "await program.acall": lambda text: program.acall(text=text),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, *waited)}

    async def measure() -> None:
        for text in tqdm(take(texts, LONE * ROUNDS), desc="lone calls", unit="text"):
            for name in random.sample(list(seconds), len(seconds)):
                started = time.perf_counter()
                if name in ways:
                    ways[name](text)
                else:
                    await waited[name](text)
                seconds[name].append(time.perf_counter() - started)

    asyncio.run(measure())
    alone = seconds.pop("the encoder alone")
    return [
        [f"a lone {name}", f"{len(found)}", "time to the encoder's alone", of(np.divide(found, alone), 2)]
        for name, found in seconds.items()
    ]


def evaluate_in_threads(program: dspy.Module, texts: Sequence[str]) -> None:
    """`dspy.Evaluate` with a metric that costs nothing."""
    devset = [dspy.Example(text=text).with_inputs("text") for text in texts]
    dspy.Evaluate(devset=devset, metric=lambda example, prediction, trace=None: 1, num_threads=THREADS)(program)


async def lateness(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds by which a task that sleeps 1 ms wakes late while the calls run as tasks."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(1e-3)
            late.append(1e3 * (time.perf_counter() - started) - 1)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.05)
    late.clear()
    await asyncio.gather(*(call() for call in calls))
    ticking.cancel()
    return late


def take(texts: Any, count: int) -> list[str]:
    """The next so many texts."""
    return [next(texts) for _ in range(count)]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def of(values: Sequence[float], digits: int = 0) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
