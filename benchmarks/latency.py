"""Time of one decision, of many in a batch, and of many threads that share one route.

    python benchmarks/latency.py

Every text is new to the encoder, which keeps no vectors here. What is compared is measured in turns, so that noise
on the machine hits all of it, and the ratios are taken round by round: the machine's own speed cancels out.

The route and semantic-router choose among CLINC150's 150 intents, both from the published ten examples of each.
"""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from common import examples, print_table, quartiles, read, semantic_router
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder

DECISIONS = 400  # texts for the time of one decision
MANY = 1000  # texts a round for batches and threads
BATCH_ROUNDS = 3
THREADS = (1, 2, 4, 8, 16, 32, 64)
HEADERS = ("what", "calls", "p50 ms", "p95 ms", "calls/s", "ratio (quartiles)", "of what", "differ", "errors")


def main() -> None:
    """Measure and print the table."""
    encoder = SentenceEncoder(cache_size=0)
    shots, train = read("clinc150", "fewshot_train_10"), read("clinc150", "train")
    route = DifferentiableRoute("text -> intent", tools=sorted({row.label for row in shots}), encoder=encoder)
    route = RouteFinetune().compile(route, trainset=examples(shots))
    router = semantic_router(encoder, shots)
    requests = sorted({row.text for row in read("snips", "test")})
    many = sorted({row.text for row in train} - {row.text for row in shots})
    random.Random(0).shuffle(requests)
    random.Random(0).shuffle(many)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = one_decision(route, router, requests[:DECISIONS])
    torch.set_num_threads(threads)
    lines += batches(route, many[: BATCH_ROUNDS * MANY])
    lines += shared_by_threads(route, many[: (len(THREADS) - 2) * MANY])
    title = f"Decisions among 150 intents; torch with 1 thread for one decision, with its own {threads} for the rest"
    print_table(title, HEADERS, lines)


def one_decision(route: DifferentiableRoute, router: Any, texts: Sequence[str]) -> list[list[str]]:
    """Each way to treat one text, on the same texts, in random turns."""
    encoder = route.encoder
    base = "the encoder alone"
    ways: dict[str, Callable[[str], Any]] = {
        base: encoder.encode_one,
        "SentenceTransformer.encode": lambda text: encoder.transformer.encode(text, show_progress_bar=False),
        "route(...)": lambda text: route(text=text),
        "semantic-router": router,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way("warm up")
    order = random.Random(0)
    for text in tqdm(texts, desc="one decision", unit="text"):
        for name in order.sample(list(ways), len(ways)):
            seconds[name].append(timed(ways[name], text))
    return [
        ["one text: " + name, f"{len(found)}", *milliseconds(found), f"{1 / np.median(found):,.0f}",
         ratio(found, seconds[base]), base, "", ""]
        for name, found in seconds.items()
    ]  # fmt: skip


def batches(route: DifferentiableRoute, texts: Sequence[str]) -> list[list[str]]:
    """A batch against single calls and against the bare model, round by round."""
    model = route.encoder.transformer
    base = "SentenceTransformer.encode"
    ways: dict[str, Callable[[list[str]], Any]] = {
        base: lambda part: model.encode(part, show_progress_bar=False),
        "route.batch": lambda part: route.batch([{"text": text} for text in part]),
        "single calls": lambda part: [route(text=text) for text in part],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=BATCH_ROUNDS * len(ways), desc="batches", unit="batch") as bar:
        for part in parts(texts):
            for name, way in ways.items():
                seconds[name].append(timed(way, part))
                bar.update()
    return [
        [f"{MANY:,} texts: {name}", f"{len(found) * MANY:,}", "", "", f"{MANY / np.median(found):,.0f}",
         ratio(seconds[base], found), f"{base}'s calls/s", "", ""]
        for name, found in seconds.items()
    ]  # fmt: skip


def shared_by_threads(route: DifferentiableRoute, texts: Sequence[str]) -> list[list[str]]:
    """One route called from many threads.

    One thread and the most threads decide all texts; the numbers between decide a part each. Every run is
    compared, in time and in decisions, with one thread's run on the same part.
    """
    least, *between, most = THREADS
    seconds: dict[int, list[float]] = {count: [] for count in THREADS}
    alone: dict[int, list[float]] = {count: [] for count in THREADS}
    differ, errors = dict.fromkeys(THREADS, 0), dict.fromkeys(THREADS, 0)
    with tqdm(total=3 * len(between), desc="threads", unit="run") as bar:
        for part, middle in zip(parts(texts), between, strict=True):
            expected: list[str] = []
            for count in (least, middle, most):
                started = time.perf_counter()
                chosen = decide(route, part, count)
                seconds[count].append(time.perf_counter() - started)
                expected = expected or chosen
                alone[count].append(seconds[least][-1])
                failed = [choice.startswith("error: ") for choice in chosen]
                errors[count] += sum(failed)
                differ[count] += sum(map(str.__ne__, chosen, expected)) - sum(failed)
                bar.update()
    return [
        [f"{count} threads" if count > 1 else "1 thread", f"{len(found) * MANY:,}", "", "",
         f"{MANY / np.median(found):,.0f}", ratio(alone[count], found), "1 thread's calls/s", f"{differ[count]}",
         f"{errors[count]}"]
        for count, found in seconds.items()
    ]  # fmt: skip


def decide(route: DifferentiableRoute, texts: Sequence[str], threads: int) -> list[str]:
    """The decisions of a route that so many threads share; a call that raised gives `error: ...`."""

    def one(text: str) -> str:
        try:
            return route(text=text).intent
        except Exception as error:
            return f"error: {error}"

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, texts))


def parts(texts: Sequence[str]) -> list[list[str]]:
    """Texts in parts of `MANY`."""
    return [list(texts[start : start + MANY]) for start in range(0, len(texts), MANY)]


def timed(call: Callable[[Any], Any], argument: Any) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call(argument)
    return time.perf_counter() - started


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """Median and 95th percentile."""
    return [f"{1e3 * value:.2f}" for value in np.percentile(seconds, [50, 95])]


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Median and quartiles of the ratios of two series, round by round."""
    low, middle, high = quartiles(np.array(above) / np.array(below))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
