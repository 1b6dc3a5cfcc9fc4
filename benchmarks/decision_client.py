"""A plain `dspy.Predict` in front of a `DecisionClient`: how well it decides untrained and trained, and what it costs.

    python benchmarks/decision_client.py

Choices and booleans on SNIPS's test rows. For the booleans there is one question a tool, `QUESTIONS`, written once;
balanced accuracy is the mean of the two classes' recalls, 50 % being chance, since six of seven answers are "no".
Area under the ROC curve says what `dspy.experimental.ReAnchor` can make of the probabilities by moving the threshold.
"""

import time
from statistics import fmean

import dspy
import numpy as np
from common import VECTORS, Row, accuracy, print_table, quartiles, sample_per_label
from quality import labelled
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tqdm.auto import tqdm

from dspy_router import DecisionClient, DifferentiableRoute, RouteFinetune, SentenceEncoder, record_decisions
from dspy_router.demo.assistant import TOOLS, ToolName

QUESTIONS = {
    "add_to_playlist": "Does the user want to add a song to a playlist?",
    "book_restaurant": "Is this a restaurant booking?",
    "get_weather": "Is the user asking about the weather?",
    "play_music": "Should music be played?",
    "rate_book": "Does the user rate a book?",
    "search_creative_work": "Is the user looking for a film, a book or a show?",
    "search_screening_event": "Is the user asking where or when a film is shown?",
}
LABELS = 20  # training rows a tool for the trained line
REQUESTS, ROUNDS = 50, 9


def main() -> None:
    """Print both tables."""
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    train, test = sample_per_label(labelled("snips", "train"), LABELS, 0), labelled("snips", "test")
    encoder.encode([row.text for row in [*train, *test]])
    print_table(
        "SNIPS test rows, %",
        ("what is asked", "untrained", f"trained on {LABELS} labels a tool"),
        [choices(encoder, train, test), *booleans(encoder, train, test)],
    )
    print_table(
        f"Time of one decision, to the encoder alone: {ROUNDS} rounds of {REQUESTS} requests, in turns",
        ("what", "ratio, median", "quartiles"),
        times([row.text for row in test]),
    )


class Plan(dspy.Signature):
    """Choose the tool that serves a request."""

    text: str = dspy.InputField()
    tool: ToolName = dspy.OutputField(desc="the tool that serves the request")


def choices(encoder: SentenceEncoder, train: list[Row], test: list[Row]) -> list[str]:
    """Accuracy of choosing among the tools, whose names alone are known."""
    scores = []
    for predictor in untrained_and_trained(Plan, encoder, [(row.text, {"tool": row.label}) for row in train]):
        scores.append(accuracy([predictor(text=row.text).tool for row in test], [row.label for row in test]))
    return ["which of 7 tools, by name: right", *(f"{100 * score:.1f}" for score in scores)]


def booleans(encoder: SentenceEncoder, train: list[Row], test: list[Row]) -> list[list[str]]:
    """Balanced accuracy and area under the ROC curve, means over the questions and the least of them."""
    found: list[list[tuple[float, float]]] = [[], []]
    for tool, question in tqdm(QUESTIONS.items(), desc="booleans", unit="question"):
        signature = dspy.Signature(
            {"text": (str, dspy.InputField()), "holds": (bool, dspy.OutputField(desc=question))}, "Answer."
        )
        rows = [(row.text, {"holds": row.label == tool}) for row in train]
        truth = np.array([row.label == tool for row in test])
        for column, predictor in zip(found, untrained_and_trained(signature, encoder, rows), strict=True):
            with record_decisions() as decisions:
                answers = np.array([predictor(text=row.text).holds for row in test])
            chances = [decision.probabilities["True"] for decision in decisions]
            column.append((balanced_accuracy_score(truth, answers), roc_auc_score(truth, chances)))
    return [
        [f"7 yes-or-no questions: {name}, mean (least)",
         *(f"{100 * fmean(each[index] for each in column):.1f} ({100 * min(each[index] for each in column):.1f})"
           for column in found)]
        for index, name in enumerate(("balanced accuracy", "area under the ROC curve"))
    ]  # fmt: skip


def untrained_and_trained(signature: type[dspy.Signature], encoder: SentenceEncoder, rows: list) -> list[dspy.Predict]:
    """A predictor in front of a new client, and a copy in which it has learned from the rows."""
    predictor = dspy.Predict(signature)
    predictor.lm = DecisionClient(encoder=encoder, cache=False)
    examples = [dspy.Example(text=text, **labels).with_inputs("text") for text, labels in rows]
    return [predictor, RouteFinetune().compile(predictor, trainset=examples)]


def times(texts: list[str]) -> list[list[str]]:
    """A route and a predictor in front of it, to the encoder's own time for the same texts."""
    encoder = SentenceEncoder(cache_size=0)
    route = DifferentiableRoute(Plan, tools={tool.__name__: tool.__doc__ or "" for tool in TOOLS}, encoder=encoder)
    predictor = dspy.Predict(Plan)
    predictor.lm = route.as_lm(cache=False)
    sides = {
        "the encoder": encoder.encode_one,
        "the route": lambda text: route(text=text),
        "dspy.Predict with the route behind it": lambda text: predictor(text=text),
    }
    for side in sides.values():
        side(texts[0])
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(ROUNDS), desc="times", unit="round"):
        seconds = {}
        batch = [texts[(number * REQUESTS + index) % len(texts)] for index in range(REQUESTS)]
        for name, side in sides.items():
            started = time.perf_counter()
            for text in batch:
                side(text)
            seconds[name] = time.perf_counter() - started
        for name in sides:
            ratios[name].append(seconds[name] / seconds["the encoder"])
    lines = []
    for name, found in list(ratios.items())[1:]:
        low, middle, high = quartiles(found)
        lines.append([name, f"{middle:.2f}", f"{low:.2f}-{high:.2f}"])
    return lines


if __name__ == "__main__":
    main()
