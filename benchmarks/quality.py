"""Accuracy on SNIPS, CLINC150 and BANKING77, and the time a fit takes, against other ways to use the same labels.

    python benchmarks/quality.py [--seeds N] [--only snips|clinc150|banking77]

Every method works from the same frozen sentence vectors, TF-IDF excepted, and with its default settings. Nothing is
tuned here. Where labels are few or absent, the other methods get each option's name and description, as the route
reads them, as one more example; on all labels that would change nothing.

The texts are encoded before any clock starts. The route's seconds are those of the whole `RouteFinetune.compile`,
logistic regression's those of its `fit`.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from common import (
    VECTORS,
    Row,
    accuracy,
    described_options,
    examples,
    half_width,
    print_table,
    read,
    sample_per_label,
    semantic_router,
    texts_and_labels,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder, replace_predictor
from dspy_router.demo.assistant import TOOLS, VoiceAssistant, outcome_reached, requests
from dspy_router.learning.fit import fit_head
from dspy_router.learning.rows import TargetRows

DATASETS = ("snips", "clinc150", "banking77")
UTTERANCES = 100  # most utterances a route for semantic-router, which compares a request with every one of them
ROLLOUTS = 4200  # two for each of the demo's 2,100 examples
REPETITIONS = 5
METHODS = ("this package", "log. regression", "centroid", "TF-IDF + LR", "semantic-router")
HEADERS = ("dataset", "setting", *METHODS, "fit s", "LR fit s")


@dataclass(frozen=True)
class Task:
    """One dataset in one setting: what may be learned from, and what is asked."""

    dataset: str
    setting: str
    route: DifferentiableRoute
    train: list[Row]
    test: list[Row]
    seed: int = 0

    @property
    def shown(self) -> list[Row]:
        """What the other methods learn from: the training rows and, unless there are many, the options' texts."""
        return self.train if self.setting == "all labels" else [*self.train, *described_options(self.route)]


@dataclass(frozen=True)
class Outcome:
    """Accuracy by method, and the seconds of the two fits, None where nothing is fitted."""

    accuracy: dict[str, float]
    seconds: float | None
    regression_seconds: float | None = None


def main() -> None:
    """Run what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the SNIPS few-shot examples")
    parser.add_argument("--only", choices=DATASETS, help="one dataset")
    options = parser.parse_args()
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    rows, chosen = [], [options.only] if options.only else DATASETS
    for dataset in chosen:
        encode(dataset, encoder)
        tasks = list(settings(dataset, encoder, options.seeds))
        outcomes: dict[str, list[Outcome]] = {}
        for task in tqdm(tasks, desc=f"{dataset}: settings", unit="setting"):
            outcomes.setdefault(task.setting, []).append(solve(task))
        rows += [line(dataset, setting, found, len(tasks[0].test)) for setting, found in outcomes.items()]
        if dataset == "snips":
            rows.append(metric_only_line())
    title = (
        "Right decisions on the test rows, %: ± half of the 95 % Wilson interval; [least, most] of "
        f"{options.seeds} draws"
    )
    print_table(title, HEADERS, rows)
    if "clinc150" in chosen:
        print_table(
            f"Training on CLINC150's 15,000 vectors, {REPETITIONS} fits each, in turns",
            ("what", "median s", "least-most s", "ratio to LR", "accuracy %"),
            training_time(encoder),
        )


def settings(dataset: str, encoder: SentenceEncoder, seeds: int) -> Iterator[Task]:
    """The tasks of a dataset."""
    train, test = labelled(dataset, "train"), labelled(dataset, "test")
    route = untrained(dataset, train, encoder)
    yield Task(dataset, "zero-shot", route, [], test)
    for shots in (5, 10):
        setting = f"{shots}-shot"
        if dataset == "snips":
            for seed in range(seeds):
                yield Task(dataset, setting, route, sample_per_label(train, shots, seed), test, seed)
        else:
            few = read(dataset, f"fewshot_train_{shots}")
            yield Task(dataset, setting, route, few, read(dataset, "fewshot_test"))
    yield Task(dataset, "all labels", route, train, test)


def untrained(dataset: str, rows: list[Row], encoder: SentenceEncoder) -> DifferentiableRoute:
    """A route over the demo's tools for SNIPS, over the intents' names elsewhere."""
    tools = TOOLS if dataset == "snips" else sorted({row.label for row in rows})
    return DifferentiableRoute("text -> intent", tools=tools, encoder=encoder)


def labelled(dataset: str, part: str) -> list[Row]:
    """The rows of a part, SNIPS labels as the demo's tool names."""
    rows = read(dataset, part)
    if dataset != "snips":
        return rows
    names = {tool.__name__.replace("_", ""): tool.__name__ for tool in TOOLS}
    return [Row(row.text, names[row.label.lower()]) for row in rows]


def encode(dataset: str, encoder: SentenceEncoder) -> None:
    """Put the vectors of all texts of a dataset into the encoder's cache."""
    few = [] if dataset == "snips" else ["fewshot_train_5", "fewshot_train_10", "fewshot_test"]
    texts = [row.text for part in ("train", "test", *few) for row in read(dataset, part)]
    encoder.encode(texts, progress=lambda batches: tqdm(batches, desc=f"{dataset}: encoding", unit="batch"))


def solve(task: Task) -> Outcome:
    """All methods on one task."""
    ours, seconds = this_package(task)
    regression, regression_seconds = logistic_regression(task)
    scores = (ours, regression, nearest_centroid(task), tfidf(task), semantic_router_accuracy(task))
    return Outcome(dict(zip(METHODS, scores, strict=True)), seconds, regression_seconds)


def this_package(task: Task) -> tuple[float, float | None]:
    """The route, compiled from the labels if there are any."""
    route, seconds = task.route, None
    if task.train:
        trainset = examples(task.train)
        started = time.perf_counter()
        route = RouteFinetune().compile(route, trainset=trainset)
        seconds = time.perf_counter() - started
    chosen = [prediction.intent for prediction in route.batch([{"text": row.text} for row in task.test])]
    return accuracy(chosen, [row.label for row in task.test]), seconds


def vectors_and_labels(task: Task) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """Vectors and labels of what the other methods learn from, and of the test rows."""
    encode = task.route.encoder.encode
    train_texts, train_labels = texts_and_labels(task.shown)
    test_texts, test_labels = texts_and_labels(task.test)
    return encode(train_texts), train_labels, encode(test_texts), test_labels


def logistic_regression(task: Task) -> tuple[float, float]:
    """Logistic regression on the vectors, with the seconds of its fit."""
    vectors, labels, test_vectors, test_labels = vectors_and_labels(task)
    started = time.perf_counter()
    model = regression().fit(vectors, labels)
    seconds = time.perf_counter() - started
    return float(model.score(test_vectors, test_labels)), seconds


def regression() -> LogisticRegression:
    """Logistic regression as all comparisons use it."""
    return LogisticRegression(C=10, max_iter=300)


def nearest_centroid(task: Task) -> float:
    """The option whose examples' mean vector has the largest cosine with the request."""
    vectors, labels, test_vectors, test_labels = vectors_and_labels(task)
    names = sorted(set(labels))
    centroids = np.stack([vectors[np.array(labels) == name].mean(axis=0) for name in names])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return accuracy([names[index] for index in (test_vectors @ centroids.T).argmax(axis=1)], test_labels)


def tfidf(task: Task) -> float:
    """Logistic regression on word counts: no sentence vectors."""
    texts, labels = texts_and_labels(task.shown)
    test_texts, test_labels = texts_and_labels(task.test)
    counts = TfidfVectorizer()
    model = regression().fit(counts.fit_transform(texts), labels)
    return float(model.score(counts.transform(test_texts), test_labels))


def semantic_router_accuracy(task: Task) -> float:
    """semantic-router on the same vectors."""
    router = semantic_router(task.route.encoder, sample_per_label(task.shown, UTTERANCES, task.seed))
    return router.evaluate(*texts_and_labels(task.test))


def line(dataset: str, setting: str, outcomes: list[Outcome], count: int) -> list[str]:
    """One line of the table from the outcomes of all draws of a setting."""
    cells = []
    for method in METHODS:
        scores = [outcome.accuracy[method] for outcome in outcomes]
        cell = f"{100 * fmean(scores):.1f}"
        if method == "this package":
            cell += f" ± {100 * half_width(fmean(scores), count):.1f}"
        if len(scores) > 1:
            cell += f" [{100 * min(scores):.1f}, {100 * max(scores):.1f}]"
        cells.append(cell)
    ours = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    theirs = [outcome.regression_seconds for outcome in outcomes if outcome.regression_seconds is not None]
    return [dataset, setting, *cells, f"{median(ours):.2f}" if ours else "-", f"{median(theirs):.2f}"]


def metric_only_line() -> list[str]:
    """The demo's compile: no label, only whether what the user wanted did happen."""
    train, test = requests("train"), requests("test")
    assistant = replace_predictor(VoiceAssistant(), "planner", tools=TOOLS)
    assistant.planner.encoder.encode([example.request for example in [*train, *test]])
    optimizer = RouteFinetune(outcome_reached, max_metric_calls=ROLLOUTS)
    started = time.perf_counter()
    compiled = optimizer.compile(assistant, trainset=train)
    seconds = time.perf_counter() - started
    share = sum(outcome_reached(example, compiled(**example.inputs())) for example in test) / len(test)
    setting = f"metric only, {optimizer.report.rollouts:,} rollouts, {len(train):,} examples"
    ours = f"{100 * share:.1f} ± {100 * half_width(share, len(test)):.1f}"
    return ["snips", setting, ours, "-", "-", "-", "-", f"{seconds:.2f} (with rollouts)", "-"]


def training_time(encoder: SentenceEncoder) -> list[list[str]]:
    """`fit_head` and logistic regression on the same vectors, in turns so that noise hits both."""
    train, test = read("clinc150", "train"), read("clinc150", "test")
    route = untrained("clinc150", train, encoder)
    names = route.fields[0].option_names
    vectors, test_vectors = encoder.encode([row.text for row in train]), encoder.encode([row.text for row in test])
    labels, test_labels = (np.array([names.index(row.label) for row in rows]) for rows in (train, test))
    seconds: dict[str, list[float]] = {"fit_head": [], "LogisticRegression": []}
    for _ in tqdm(range(REPETITIONS), desc="clinc150: training time", unit="repetition"):
        head = copy.deepcopy(route.head["intent"])
        started = time.perf_counter()
        fit_head(head, vectors, TargetRows.from_labels(labels, len(names)))
        between = time.perf_counter()
        model = regression().fit(vectors, labels)
        seconds["LogisticRegression"].append(time.perf_counter() - between)
        seconds["fit_head"].append(between - started)
    right = {
        "fit_head": float(np.mean(head.policy(test_vectors).argmax(axis=1) == test_labels)),
        "LogisticRegression": float(model.score(test_vectors, test_labels)),
    }
    base = median(seconds["LogisticRegression"])
    return [
        [what, f"{median(found):.2f}", f"{min(found):.2f}-{max(found):.2f}", f"{median(found) / base:.2f}",
         f"{100 * right[what]:.1f}"]
        for what, found in seconds.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
