"""Calling the LM for batches of requests: in threads, with failures counted and usage kept."""

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.parallelizer import ParallelExecutor
from dspy.utils.usage_tracker import UsageTracker, track_usage
from tqdm.auto import tqdm

from dspy_router.encoders.base import shortened
from dspy_router.errors import RouteError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One LM call to make.

    Attributes:
        option: Index of the option the requests are for.
        rival: Index of the option that hard requests sound near to; None for plain ones.
        count: How many requests are asked for.
        origin: What the examples made of them say of where they come from.
        inputs: The predictor's inputs.
    """

    option: int
    rival: int | None
    count: int
    origin: str
    inputs: dict[str, Any]


class RequestCalls:
    """Asks an LM for batches of requests in DSPy's worker threads.

    Args:
        num_threads: As in `dspy.Evaluate`.
        max_errors: After so many failed calls no more are made; None is DSPy's setting.
        usage: Where the calls' usage is added.
        bar: Moves on by each request that comes in.
    """

    def __init__(self, num_threads: int | None, max_errors: int | None, usage: UsageTracker, bar: "tqdm[Any]") -> None:
        self.num_threads = num_threads
        self.max_errors = dspy.settings.max_errors if max_errors is None else max_errors
        self.usage = usage
        self.bar = bar
        self.made = 0
        self.errors: Counter[str] = Counter()
        self.last_error = ""
        self._lock = threading.Lock()

    def ask(self, predict: dspy.Module, batches: Sequence[Batch]) -> list[list[str]]:
        """The requests of each batch, in the batches' order; none where the call failed.

        Raises:
            RouteError: When `max_errors` calls have failed.
        """

        def one(batch: Batch) -> list[str]:
            if self.errors.total() >= self.max_errors:
                return []
            requests, failure = [], None
            with track_usage() as usage:
                try:
                    requests = list(predict(**batch.inputs).requests)
                except Exception as raised:
                    failure = raised
            with self._lock:
                self.made += 1
                self.bar.update(len(requests))
                for model, entries in usage.usage_data.items():
                    self.usage.usage_data[model].extend(entries)
                if failure is not None:
                    self.errors[type(failure).__name__] += 1
                    self.last_error = f"{type(failure).__name__}: {shortened(' '.join(str(failure).split()), 300)}"
                    logger.warning("An LM call for requests failed: %s", self.last_error)
            return requests

        # No timeout: DSPy would make a slow call a second time and pay twice.
        executor = ParallelExecutor(
            num_threads=self.num_threads, max_errors=len(batches) + 1, disable_progress_bar=True, timeout=0
        )
        # DSPy would give each thread a copy of the caller's tracker, and copy it while others add to it: usage is added
        # above, and there alone.
        with dspy.context(usage_tracker=None):
            answers: list[list[str]] = executor.execute(one, list(batches))
        if self.errors.total() >= self.max_errors:
            raise RouteError(
                f"Stopped after {self.errors.total()} LM calls that failed (max_errors={self.max_errors}); the last: "
                f"{self.last_error}. Call again once that is mended; with DSPy's cache on, no answer is paid for twice."
            )
        return answers
