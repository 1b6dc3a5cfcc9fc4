"""List outputs: which of several tools or intents a request needs, beside one-vs-rest logistic regression.

    python benchmarks/sets.py

Requests that need several things are made, since the data sets have none: one to three rows of a data set, joined by
"and", "then" or punctuation, need what their rows need; one in six of CLINC150's is out of scope and needs nothing.
Training requests are made of training rows, test requests of test rows. Every draw makes both anew, and the figures are
means ± standard deviations over the draws. All methods work on the same frozen vectors and, where they learn, get each
option's name and description as one more example. Nothing is tuned here: the settings of this package, and the C of
logistic regression (of 1, 10 and 100 the two best where classes are balanced), were chosen on validation rows.

`exact` is the share of requests for which the whole list is right. Trained, the package takes an option from a
calibrated probability of one half, which is a threshold of its own for each on what the fit gives. The lines after that
show what it brings: the fit without any, with one threshold on the probabilities that is best for micro-F1 on held-out
training rows, and with own ones that F1 asks for.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import dspy
import numpy as np
from common import VECTORS, Row, print_table, quartiles, read
from quality import labelled
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.demo.assistant import TOOLS
from dspy_router.learning.fit import fit_head
from dspy_router.learning.list_calibration import calibrate_list, held_out_logits
from dspy_router.learning.list_rows import ListRows
from dspy_router.list_heads import ListHead

JOINS = (" and ", ", and ", ". ", ", then ", " also ", "; ")
SETTINGS = (("snips", 50), ("snips", 500), ("clinc150", 1000))  # and how many training requests
DRAWS, TEST = 3, 500
OPTIONS, REQUESTS, ROUNDS = 50, 40, 9  # of the measurement of time
MEASURES = ("micro-F1", "macro-F1", "exact")


@dataclass(frozen=True)
class Part:
    """Requests with what each needs: texts, vectors [n, d] and bool [n, k]."""

    texts: list[str]
    vectors: np.ndarray
    members: np.ndarray


@dataclass(frozen=True)
class Task:
    """One draw of a setting."""

    route: DifferentiableRoute
    train: Part
    test: Part

    @property
    def head(self) -> ListHead:
        """The route's, untrained."""
        head = self.route.head["tools"]
        assert isinstance(head, ListHead)
        return head


def main() -> None:
    """Print the tables."""
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    for dataset, count in SETTINGS:
        found: dict[str, list[tuple[float, ...]]] = {}
        for draw in tqdm(range(DRAWS), desc=f"{dataset}, {count} requests", unit="draw"):
            task = drawn(dataset, count, draw, encoder)
            for method, chosen in lists(task):
                found.setdefault(method, []).append(measured(task.test.members, chosen))
        options = len(task.route.fields[0].options)
        print_table(
            f"{dataset}: lists of {options} options, {count} training requests, {TEST} test requests, %",
            ("method", *MEASURES),
            [[method, *map(cell, zip(*figures, strict=True))] for method, figures in found.items()],
        )
    print_table(
        f"Time of one decision, to the encoder alone: {ROUNDS} rounds of {REQUESTS} requests, in turns",
        ("what", "ratio, median", "quartiles"),
        [times()],
    )


def drawn(dataset: str, count: int, draw: int, encoder: SentenceEncoder) -> Task:
    """A draw of training and test requests, encoded."""
    rows = {part: labelled("snips", part) if dataset == "snips" else read(dataset, part) for part in ("train", "test")}
    names = list(dict.fromkeys(row.label for row in rows["train"]))
    nothing = {
        "train": read("clinc150", "oos_val") if dataset == "clinc150" else [],
        "test": read("clinc150", "oos_test") if dataset == "clinc150" else [],
    }
    route = DifferentiableRoute("text -> tools: list[str]", TOOLS if dataset == "snips" else names, encoder=encoder)
    parts = []
    for part, size in (("train", count), ("test", TEST)):
        requests = joined(rows[part], nothing[part], size, random.Random(f"{part} {draw}"))
        needed = [[name in needs for name in route.fields[0].option_names] for _, needs in requests]
        texts = [text for text, _ in requests]
        parts.append(Part(texts, encoder.encode(texts), np.array(needed)))
    return Task(route, *parts)


def joined(rows: Sequence[Row], nothing: Sequence[Row], count: int, draws: random.Random) -> list[tuple[str, set[str]]]:
    """So many requests, each with what it needs."""
    found = []
    for _ in range(count):
        size = draws.choice((1, 1, 2, 2, 3, 0) if nothing else (1, 1, 2, 2, 3))
        chosen = draws.sample(rows, size)
        text = chosen[0].text if chosen else draws.choice(nothing).text
        for row in chosen[1:]:
            text += draws.choice(JOINS) + row.text
        found.append((text, {row.label for row in chosen}))
    return found


def lists(task: Task) -> Iterator[tuple[str, np.ndarray]]:
    """What each method puts into the test requests' lists, bool [n, k]."""
    names = task.route.fields[0].option_names
    yield "this package, untrained", decided(task.route, task.test.texts)
    labels = [[name for name, needed in zip(names, row, strict=True) if needed] for row in task.train.members]
    examples = [
        dspy.Example(text=text, tools=tools).with_inputs("text")
        for text, tools in zip(task.train.texts, labels, strict=True)
    ]
    yield "this package, trained", decided(RouteFinetune().compile(task.route, trainset=examples), task.test.texts)
    yield from thresholds(task)
    for title, settings in (
        ("logistic regression", {}),
        ("logistic regression, balanced, C=10", {"C": 10, "class_weight": "balanced"}),
        ("logistic regression, balanced, C=100", {"C": 100, "class_weight": "balanced"}),
    ):
        yield title, regression(task, **settings)


def decided(route: DifferentiableRoute, texts: Sequence[str]) -> np.ndarray:
    """What a route decides."""
    predictions = route.batch([{"text": text} for text in texts])
    return np.array([[name in prediction.tools for name in route.fields[0].option_names] for prediction in predictions])


def thresholds(task: Task) -> Iterator[tuple[str, np.ndarray]]:
    """The same head with other thresholds."""
    head, rows = task.route.deepcopy().head["tools"], ListRows.from_sets(task.train.members)
    fit_head(head, task.train.vectors, rows)
    seen = held_out_logits(task.head, task.train.vectors, rows)
    assert seen is not None
    calibration = calibrate_list(seen.logits, rows.part(seen.rows))
    assert calibration is not None
    logits = head.logits(task.test.vectors)
    yield "its fit, without thresholds", logits >= 0
    chances, held_out = expit(calibration(logits)), expit(calibration(seen.logits))
    truth = task.train.members[seen.rows]
    levels = np.linspace(0.02, 0.98, 97)
    common = max(levels, key=lambda level: f1_score(truth, held_out >= level, average="micro", zero_division=0))
    yield "its fit, one threshold for micro-F1", chances >= common
    ranked = -np.sort(-held_out, axis=0)
    expected = 2 * ranked.cumsum(axis=0) / (np.arange(1, len(ranked) + 1)[:, None] + ranked.sum(axis=0))
    yield "its fit, own thresholds for expected F1", chances >= expected.max(axis=0) / 2


def regression(task: Task, **settings: object) -> np.ndarray:
    """One-vs-rest logistic regression on the same vectors, the options' descriptions among the examples."""
    described = task.head.option_vectors.numpy()
    vectors = np.concatenate([task.train.vectors, described])
    members = np.concatenate([task.train.members, np.eye(len(described), dtype=bool)])
    fitted = [LogisticRegression(max_iter=1000, **settings).fit(vectors, column) for column in members.T]
    return np.stack([one.predict(task.test.vectors) for one in fitted], axis=1).astype(bool)


def measured(truth: np.ndarray, chosen: np.ndarray) -> tuple[float, ...]:
    """Micro-F1, macro-F1 and the share of lists that are right."""
    scores = [f1_score(truth, chosen, average=average, zero_division=0) for average in ("micro", "macro")]
    return (*scores, float((truth == chosen).all(axis=1).mean()))


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation in %."""
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def times() -> list[str]:
    """A route that decides a list of many options, to the encoder's own time for the same texts."""
    encoder = SentenceEncoder(cache_size=0)
    rows = read("clinc150", "test")
    names = list(dict.fromkeys(row.label for row in rows))[:OPTIONS]
    route = DifferentiableRoute("text -> tools: list[str]", names, encoder=encoder)
    texts = [row.text for row in random.Random(0).sample(rows, REQUESTS)]
    route(text=texts[0])
    ratios = []
    for _ in tqdm(range(ROUNDS), desc="times", unit="round"):
        started = time.perf_counter()
        for text in texts:
            encoder.encode_one(text)
        alone = time.perf_counter() - started
        started = time.perf_counter()
        for text in texts:
            route(text=text)
        ratios.append((time.perf_counter() - started) / alone)
    low, middle, high = quartiles(ratios)
    return [f"the route, a list of {OPTIONS} options", f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]


if __name__ == "__main__":
    main()
