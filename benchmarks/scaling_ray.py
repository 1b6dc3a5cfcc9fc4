"""Rollouts and rows a second in the worker processes of a Ray cluster, beside this process's own threads.

    python benchmarks/scaling_ray.py

All runs on one machine, whose cores are the limit: a second worker can add nothing where the first keeps every core
busy. What is compared is measured in turns, and the ratios are taken round by round. Workers are started, and have
loaded the program, before their rollouts are timed; a dataset's time holds the start of its workers, and is given
without it as well.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
import ray
import ray.data
import torch
from common import print_table, quartiles, read

from dspy_router import DifferentiableRoute, SentenceEncoder
from dspy_router.distributed import RayExecutor, route_dataset
from dspy_router.optimizers.rollouts import Job, RolloutRunner, keyed
from dspy_router.optimizers.runs import find_routes

ROUNDS = 7
ROLLOUTS = 96  # a round
ROWS, ROW_ROUNDS = 1500, 3
THREADS = 4  # in this process, and in each worker
LM_SECONDS = 0.05  # how long the program waits that stands for one with an LM
ONE, TWO = "1 worker", "2 workers"
HEADERS = ("what", "where", "a second", "ms each", "ratio to threads (quartiles)")


class Waiting(dspy.Module):
    """A program that waits as long as an LM might take, and decides."""

    def __init__(self, route: DifferentiableRoute, seconds: float) -> None:
        super().__init__()
        self.route = route
        self.seconds = seconds

    def forward(self, text: str) -> dspy.Prediction:
        """Wait and decide."""
        time.sleep(self.seconds)
        return self.route(text=text)


def main() -> None:
    """Measure and print the tables."""
    start_cluster()
    print_rollouts(rollouts())
    print_table(f"Rows of a dataset on {os.cpu_count()} cores", HEADERS, rows())


def start_cluster() -> None:
    """A cluster on this machine; one thread of torch, as in a worker."""
    ray.init(num_cpus=3, object_store_memory=200_000_000, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    torch.set_num_threads(1)


def print_rollouts(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Print what `rollouts` has measured."""
    lines = [line for what, each in seconds.items() for line in _lines(what, each, ROLLOUTS)]
    print_table(f"Rollouts on {os.cpu_count()} cores", HEADERS, lines)


def rollouts() -> dict[str, dict[str, list[float]]]:
    """Seconds of each round of three programs, by program and place: in threads, in one worker and in two."""
    names = sorted({row.label for row in read("clinc150", "fewshot_train_10")})
    texts = sorted({row.text for row in read("clinc150", "train")})[: (ROUNDS + 1) * ROLLOUTS]
    examples = keyed([dspy.Example(text=text).with_inputs("text") for text in texts])
    programs = {
        "a decision on a known text": Waiting(_route(names, initials), 0.0),
        "a decision on a new text": Waiting(_route(names, SentenceEncoder(cache_size=0)), 0.0),
        f"a wait of {1e3 * LM_SECONDS:.0f} ms and a decision": Waiting(_route(names, initials), LM_SECONDS),
    }
    seconds = {}
    for what, program in programs.items():
        executors = {"threads": None, ONE: RayExecutor(1, threads=THREADS), TWO: RayExecutor(2)}
        runners = {
            where: RolloutRunner(
                program, find_routes(program), None,
                num_threads=THREADS, failure_score=0.0, max_errors=1, executor=executor,
            )
            for where, executor in executors.items()
        }  # fmt: skip

        def run(runner: RolloutRunner, number: int, examples: Sequence[Any] = examples) -> None:
            jobs = [Job(index) for index in range(number * ROLLOUTS, (number + 1) * ROLLOUTS)]
            runner.run(jobs, examples, phase=str(number))

        ways = {where: lambda number, own=runner: run(own, number) for where, runner in runners.items()}
        for runner in runners.values():  # until all workers have loaded the program
            run(runner, 0)
            time.sleep(1)
            run(runner, 0)
        seconds[what] = _in_turns(ways, ROUNDS)
        for runner in runners.values():
            runner.close()
    return seconds


def rows() -> list[list[str]]:
    """A dataset in `route.batch` and in one and two workers of Ray Data, with and without the start of the workers."""
    names = sorted({row.label for row in read("clinc150", "fewshot_train_10")})
    texts = sorted({row.text for row in read("clinc150", "train")})[:ROWS]
    route = _route(names, SentenceEncoder(cache_size=0))
    inputs = [{"text": text} for text in texts]

    def routed(workers: int, given: Sequence[Mapping[str, str]]) -> None:
        data = ray.data.from_items(list(given), override_num_blocks=8 if len(given) > 8 else 1)
        found = route_dataset(route, data, workers=workers, batch_size=128).materialize().count()
        assert found == len(given)

    ways: dict[str, Callable[[int], Any]] = {
        "route.batch": lambda number: route.batch(inputs),
        ONE: lambda number: routed(1, inputs),
        TWO: lambda number: routed(2, inputs),
        "start": lambda number: routed(1, inputs[:1]),
    }
    routed(1, inputs[:1])
    seconds = _in_turns(ways, ROW_ROUNDS)
    starts = seconds.pop("start")
    beyond = {
        where: [time - start * (where != "route.batch") for time, start in zip(times, starts, strict=True)]
        for where, times in seconds.items()
    }
    lines = _lines(f"{ROWS:,} rows", seconds, ROWS) + _lines("the same without the start", beyond, ROWS)
    start = quartiles(starts)
    return [*lines, ["the start", "", "", f"{1e3 * start[1]:,.0f}", ""]]


def initials(texts: list[str]) -> Any:
    """Vectors of letter counts: an encoder that costs next to nothing."""
    import numpy as np

    return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


def _route(names: Sequence[str], encoder: Any) -> DifferentiableRoute:
    return DifferentiableRoute("text -> intent", tools=list(names), encoder=encoder)


def _in_turns(ways: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {where: [] for where in ways}
    for number in range(rounds):
        for where, way in ways.items():
            started = time.perf_counter()
            way(number + 1)
            seconds[where].append(time.perf_counter() - started)
    return seconds


def _lines(what: str, seconds: Mapping[str, Sequence[float]], count: int) -> list[list[str]]:
    base = next(iter(seconds.values()))
    lines = []
    for where, times in seconds.items():
        middle = quartiles(times)[1]
        low, ratio, high = quartiles([first / second for first, second in zip(base, times, strict=True)])
        figures = [f"{count / middle:,.0f}", f"{1e3 * middle / count:.2f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        lines.append([what, where, *figures])
    return lines


if __name__ == "__main__":
    main()
