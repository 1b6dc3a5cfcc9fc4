"""Time and accuracy of training on CLINC150, against scikit-learn, SetFit and semantic-router, on the same weights.

    python benchmarks/training.py [--repetitions N] [--setfit-steps N] [--only all|few]

All methods get the same texts, with default settings, and each text's vector beforehand: what is timed is what each
does with it, in turns, so that noise on the machine hits all. Ratios are taken turn by turn. Nothing is tuned here.

SetFit fine-tunes the encoder itself on pairs of texts, then fits a logistic regression to the new vectors. On so many
texts the pairs of its default take days on a CPU, so it gets a number of steps; its time includes encoding the
texts anew, which is part of what it does. It is run once, and left out where it is not installed.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import (
    VECTORS,
    Row,
    accuracy,
    examples,
    half_width,
    print_table,
    quartiles,
    read,
    semantic_router,
    texts_and_labels,
)
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.learning.fit import fit_head
from dspy_router.learning.rows import TargetRows

SETTINGS = {"all": ("train", "test", "15,000 texts"), "few": ("fewshot_train_10", "fewshot_test", "10 an intent")}
HEADERS = ("texts", "method", "seconds", "to logistic regression (quartiles)", "right on test rows, %")
BASE = "LogisticRegression.fit"
TO_LR = 10.0  # its C, as in all comparisons
UTTERANCES = 100  # most utterances a route that semantic-router keeps here

Model = Callable[[Sequence[str]], Sequence[str]]


def main() -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="turns of every method but SetFit")
    parser.add_argument("--setfit-steps", type=int, default=100, help="batches of 16 pairs that SetFit learns from")
    parser.add_argument("--only", choices=SETTINGS, help="one setting")
    options = parser.parse_args()
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    lines = []
    for name, (train, test, title) in SETTINGS.items():
        if options.only in (None, name):
            lines += setting(encoder, read("clinc150", train), read("clinc150", test), title, options)
    print_table(f"Training on CLINC150, {torch.get_num_threads()} threads", HEADERS, lines)


def setting(
    encoder: SentenceEncoder, train: list[Row], test: list[Row], title: str, options: argparse.Namespace
) -> list[list[str]]:
    """The lines of one training set."""
    texts, labels = texts_and_labels(test)
    held_out = read("clinc150", "val")
    encoder.encode(
        [row.text for row in [*train, *test, *held_out]], progress=lambda batches: tqdm(batches, desc="encoding")
    )
    methods: dict[str, Callable[[], Model]] = {
        BASE: lambda: regression(encoder, train),
        "fit_head": lambda: head_alone(encoder, train),
        "RouteFinetune.compile": lambda: compiled(encoder, train),
        "semantic-router fit": lambda: fitted_router(encoder, train),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    right: dict[str, float] = {}
    for _ in tqdm(range(options.repetitions), desc=title, unit="turn"):
        for name, train_one in methods.items():
            started = time.perf_counter()
            model = train_one()
            seconds[name].append(time.perf_counter() - started)
            if name not in right:  # all repeat themselves
                right[name] = accuracy(model(texts), labels)
    if options.setfit_steps and (model_and_time := setfit(encoder, train, options.setfit_steps)) is not None:
        name = f"SetFit, {options.setfit_steps} steps"
        model, taken = model_and_time
        seconds[name], right[name] = [taken], accuracy(model(texts), labels)
    return [line(title, name, found, seconds[BASE], right[name], len(test)) for name, found in seconds.items()]


def line(title: str, name: str, seconds: Sequence[float], base: Sequence[float], right: float, count: int) -> list[str]:
    """One line of the table."""
    ratios = np.array(seconds) / (np.array(base) if len(seconds) == len(base) else np.median(base))
    low, middle, high = quartiles(ratios)
    share = f"{100 * right:.1f} ± {100 * half_width(right, count):.1f}"
    return [title, name, f"{np.median(seconds):.2f}", f"{middle:.2f} ({low:.2f}-{high:.2f})", share]


def regression(encoder: SentenceEncoder, train: list[Row]) -> Model:
    """Logistic regression on the vectors."""
    texts, labels = texts_and_labels(train)
    model = LogisticRegression(C=TO_LR, max_iter=300).fit(encoder.encode(texts), labels)
    return lambda asked: list(model.predict(encoder.encode(asked)))


def head_alone(encoder: SentenceEncoder, train: list[Row]) -> Model:
    """A head, without the rest of a compile."""
    texts, labels = texts_and_labels(train)
    route = untrained(encoder, labels)
    names = list(route.fields[0].option_names)
    places = {name: place for place, name in enumerate(names)}
    rows = TargetRows.from_labels(np.array([places[label] for label in labels]), len(names))
    head = route.head["intent"]
    fit_head(head, encoder.encode(texts), rows)
    return lambda asked: [names[place] for place in head.logits(encoder.encode(asked)).argmax(axis=1)]


def compiled(encoder: SentenceEncoder, train: list[Row]) -> Model:
    """All that a compile does: the fit, calibration, what is remembered of the texts, the report."""
    route = RouteFinetune().compile(untrained(encoder, [row.label for row in train]), trainset=examples(train))
    return lambda asked: [prediction.intent for prediction in route.batch([{"text": text} for text in asked])]


def fitted_router(encoder: SentenceEncoder, train: list[Row]) -> Model:
    """semantic-router, calibrated on the validation rows: it asks for requests that it has not stored."""
    kept: dict[str, list[Row]] = {}
    for row in train:
        kept.setdefault(row.label, []).append(row)
    router = semantic_router(encoder, [row for rows in kept.values() for row in rows[:UTTERANCES]])
    router.fit(*texts_and_labels(read("clinc150", "val")))
    return lambda asked: [router(text).name or "" for text in asked]


def setfit(encoder: SentenceEncoder, train: list[Row], steps: int) -> tuple[Model, float] | None:
    """SetFit on a copy of the encoder's model, and the seconds it takes; None where it is not installed."""
    try:
        from datasets import Dataset
        from setfit import SetFitModel, Trainer, TrainingArguments
    except ImportError as error:
        print(f"\nSetFit is left out: {error}.")
        return None
    texts, labels = texts_and_labels(train)
    body = copy.deepcopy(encoder.transformer).requires_grad_(True)
    started = time.perf_counter()
    model: Any = SetFitModel(model_body=body, model_head=LogisticRegression())
    arguments = TrainingArguments(max_steps=steps, report_to="none", save_strategy="no", seed=0)
    trainer = Trainer(model, args=arguments, train_dataset=Dataset.from_dict({"text": texts, "label": labels}))
    trainer.train()
    return lambda asked: list(model.predict(list(asked))), time.perf_counter() - started


def untrained(encoder: SentenceEncoder, labels: Sequence[str]) -> DifferentiableRoute:
    """A route among the labels' names; their vectors are in the encoder's cache after the first turn."""
    return DifferentiableRoute("text -> intent", tools=sorted(set(labels)), encoder=encoder)


if __name__ == "__main__":
    main()
