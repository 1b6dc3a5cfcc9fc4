"""What the benchmarks share: data, examples for DSPy, statistics, tables and the wrapper for semantic-router."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dspy
import numpy as np
from scipy.stats import binomtest
from semantic_router import IndexedRouter, Route
from semantic_router.encoders import DenseEncoder
from tabulate import tabulate

from dspy_router import DifferentiableRoute
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.distill import distill

DATA = Path(__file__).parent / "data"
CACHE = Path(__file__).parent / ".cache"  # what later runs need not compute again
VECTORS = CACHE / "vectors.sqlite"  # for encoders whose time is not what is measured


class Row(NamedTuple):
    """One text of a dataset and its label."""

    text: str
    label: str


def read(dataset: str, part: str) -> list[Row]:
    """The rows of one part of a dataset, such as `read("clinc150", "test")`."""
    with gzip.open(DATA / dataset / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def texts_and_labels(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The columns of rows."""
    return [row.text for row in rows], [row.label for row in rows]


def sample_per_label(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most so many rows of each label, drawn at random without replacement."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    labels = sorted({row.label for row in rows})
    return [row for label in labels for row in [row for row in shuffled if row.label == label][:count]]


def examples(rows: Sequence[Row]) -> list[dspy.Example]:
    """Labelled examples for the signature `text -> intent`."""
    return [dspy.Example(text=row.text, intent=row.label).with_inputs("text") for row in rows]


def described_options(route: DifferentiableRoute) -> list[Row]:
    """Every option as the route reads it (its name in words, its description if it has one), with its name."""
    return [Row(option.text, option.name) for option in route.fields[0].options]


def accuracy(chosen: Sequence[str], labels: Sequence[str]) -> float:
    """Share of choices that are right."""
    return sum(choice == label for choice, label in zip(chosen, labels, strict=True)) / len(labels)


def half_width(share: float, count: int) -> float:
    """Half the width of the 95 % Wilson interval of a share seen in so many trials."""
    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return (interval.high - interval.low) / 2


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a title and a table; texts are shown as they are."""
    print(f"\n{title}\n")
    print(tabulate(rows, headers=headers, disable_numparse=True))


def static_folder() -> Path:
    """The default model distilled into static embeddings; made at first use, which takes a minute or two."""
    folder = CACHE / "static"
    if not (folder / "model.safetensors").exists():
        distill(folder)
    return folder


class ServedVectors(DenseEncoder):
    """A semantic-router encoder that gives the vectors of one of this package's encoders."""

    name: str = "all-MiniLM-L6-v2"
    served: Any = None

    def __call__(self, docs: list[str]) -> list[list[float]]:
        """Vectors of texts, as lists, which is what semantic-router's own local encoder gives."""
        return self.served.encode(docs).tolist()


def semantic_router(encoder: Encoder, rows: Sequence[Row]) -> IndexedRouter:
    """A semantic-router with its default settings, one route a label, the rows' texts as utterances."""
    utterances: dict[str, list[str]] = {}
    for row in rows:
        utterances.setdefault(row.label, []).append(row.text)
    routes = [Route(name=label, utterances=texts) for label, texts in utterances.items()]
    return IndexedRouter(ServedVectors(served=encoder), routes)
