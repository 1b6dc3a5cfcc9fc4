"""One run of a `RequestWriter`: what is asked for next, and what has been kept."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import dspy
import numpy as np
from tqdm.auto import tqdm

from dspy_router.fields import DecisionField
from dspy_router.options import words
from dspy_router.route import DifferentiableRoute
from dspy_router.synthesis.calls import Batch, RequestCalls
from dspy_router.synthesis.confusion import confusion, rivals
from dspy_router.synthesis.filter import RequestFilter
from dspy_router.synthesis.prompts import STYLES
from dspy_router.synthesis.report import ConfusedPair

ROUNDS = 4  # an option that is still short after so many rounds stays so: the LM repeats itself or fails
RIVALS = 3  # the most options an option's hard requests are set against
OTHERS = 5  # options named in a prompt as not to be written for
WRITTEN = 30  # earlier requests shown in a prompt, the latest ones
SURPLUS = "more than asked for"


@dataclass(frozen=True)
class WrittenRequest:
    """A request that was kept: the index of its option, its text and where it comes from."""

    option: int
    text: str
    origin: str


class Writing:
    """Writes requests in rounds, each an LM call or more for every option that is short of its number.

    The calls of a round are independent of one another, so that they run in threads; their answers are filtered in
    the calls' order. The result depends on the seed and the LM's answers alone, not on the threads.
    """

    def __init__(
        self,
        route: DifferentiableRoute,
        decided: DecisionField,
        calls: RequestCalls,
        *,
        validation: Sequence[str],
        requests_per_call: int,
        max_length: int,
        max_similarity: float,
        seed: int,
    ) -> None:
        self.route = route
        self.decided = decided
        self.calls = calls
        self.kept: list[WrittenRequest] = []
        self.dropped: Counter[str] = Counter()
        self._requests_per_call = requests_per_call
        # With a seed of its own, a run is not answered from DSPy's cache of another's.
        self._config = {"rollout_id": seed} if seed else {}
        self._filter = RequestFilter(self._encode, validation, max_similarity=max_similarity, max_length=max_length)
        # One order for all options: styles that differed between options would tell the options apart.
        self._styles = random.Random(seed).sample(list(STYLES), len(STYLES))
        self._batches = [0] * len(decided.options)
        self._others = rivals(self._confusion(), OTHERS)

    def write_plain(self, predict: dspy.Module, count: int) -> None:
        """Have up to `count` requests written for every option."""
        self._write(predict, count, None)

    def write_hard(self, predict: dspy.Module, count: int) -> tuple[ConfusedPair, ...]:
        """Have up to `count` requests written for every option that sound near to what the route takes it for.

        Returns:
            The pairs asked for, most confused first.
        """
        confused, names = self._confusion(), self.decided.option_names
        asked = self._write(predict, count, confused)
        pairs = {(batch.option, batch.rival) for batch in asked if batch.rival is not None}
        return tuple(
            ConfusedPair(names[option], names[rival], float(confused[option, rival]))
            for option, rival in sorted(pairs, key=lambda pair: (-confused[pair], pair))
        )

    def _write(self, predict: dspy.Module, count: int, confused: np.ndarray | None) -> list[Batch]:
        counts = Counter(request.option for request in self.kept)
        goals = [counts[option] + count for option in range(len(self.decided.options))]
        asked: list[Batch] = []
        for _ in range(ROUNDS):
            batches = self._plan(goals, confused)
            if not batches:
                break
            self._keep(batches, self.calls.ask(predict, batches))
            asked += batches
        return asked

    def _plan(self, goals: Sequence[int], confused: np.ndarray | None) -> list[Batch]:
        """The next round's calls; those for hard requests in the order of their pairs, most confused first."""
        taken_for = None if confused is None else rivals(confused, RIVALS)
        batches = []
        for option, goal in enumerate(goals):
            written = [request.text for request in self.kept if request.option == option]
            against = [None] if taken_for is None else taken_for[option]
            ways = len(STYLES) if taken_for is None else len(against)
            for call, count in enumerate(_shares(goal - len(written), ways, self._requests_per_call)):
                batches.append(self._batch(option, against[call % len(against)], count, written))
        if confused is not None:
            batches.sort(key=lambda batch: -confused[batch.option, batch.rival])
        return batches

    def _batch(self, option: int, rival: int | None, count: int, written: Sequence[str]) -> Batch:
        style = self._styles[self._batches[option] % len(STYLES)]
        self._batches[option] += 1
        texts = [entry.text for entry in self.decided.options]
        inputs = {
            "task": self.route.signature.instructions,
            "decision": _decision_text(self.decided),
            "option": texts[option],
            "others": [texts[other] for other in self._others[option]],
            "style": STYLES[style],
            "count": count,
            "batch": self._batches[option],
            "written": list(written[-WRITTEN:]),
            "config": self._config,
        }
        if rival is None:
            return Batch(option, None, count, f"synthetic/plain/{style}", inputs)
        name = self.decided.option_names[rival]
        return Batch(option, rival, count, f"synthetic/hard/{name}", inputs | {"rival": texts[rival]})

    def _keep(self, batches: Sequence[Batch], answers: Sequence[Sequence[str]]) -> None:
        written = [
            WrittenRequest(batch.option, text.strip(), batch.origin)
            for batch, answer in zip(batches, answers, strict=True)
            for text in answer[: batch.count]
        ]
        reasons = self._filter.judge([request.text for request in written])
        self.kept += [request for request, reason in zip(written, reasons, strict=True) if reason is None]
        self.dropped.update(reason for reason in reasons if reason is not None)
        if surplus := sum(map(len, answers)) - len(written):
            self.dropped[SURPLUS] += surplus
        self.calls.bar.update(len(self.kept) - self.calls.bar.n)

    def _confusion(self) -> np.ndarray:
        texts = [option.text for option in self.decided.options] + [request.text for request in self.kept]
        right = [*range(len(self.decided.options)), *(request.option for request in self.kept)]
        return confusion(self.route.learned.folded(self.decided.name).policy(self._encode(texts)), right)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.route.encoder.encode(texts, progress=partial(tqdm, desc="encoding", unit="batch", delay=2))


def _shares(count: int, ways: int, most: int) -> list[int]:
    """`count` requests in calls of at most `most`: a call for each of the `ways` if that leaves it two requests."""
    if count <= 0:
        return []
    calls = max(math.ceil(count / most), min(ways, count // 2), 1)
    return [count // calls + (call < count % calls) for call in range(calls)]


def _decision_text(decided: DecisionField) -> str:
    """The decided field as a prompt names it, with its description if it has one."""
    extra = decided.info.json_schema_extra
    description = extra.get("desc") if isinstance(extra, dict) else None
    own = description and description != f"${{{decided.name}}}"  # DSPy's placeholder where there is none
    return f"{words(decided.name)}: {description}" if own else words(decided.name)
