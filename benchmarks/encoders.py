"""How far the encoders agree, and what each costs in accuracy.

    python benchmarks/encoders.py [--tasks clinc150 banking77 snips]

Heads are trained on all labels of a task with each encoder's vectors, and judged on the task's test rows. A head
trained on `SentenceEncoder`'s vectors is also routed by the other forms of the same model, and the other way round: the
share of test texts on which the decision is the same. The static encoder is distilled at first.

The vectors are kept in a `vector_cache`, so that a second run encodes nothing.
"""

import argparse

import numpy as np
from common import VECTORS, Row, examples, half_width, print_table, read, static_folder
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, OnnxEncoder, RouteFinetune, SentenceEncoder, StaticEncoder
from dspy_router.encoders.base import Encoder

TASKS = ("clinc150", "banking77", "snips")
REFERENCE = "SentenceEncoder"
HEADERS = ("task", "encoder", "right in %", "as SentenceEncoder with its own head, in %", "with SentenceEncoder's head",
           "its head on SentenceEncoder's vectors", "least cosine", "mean cosine")  # fmt: skip


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    tasks = parser.parse_args().tasks
    kept = {"vector_cache": VECTORS, "cache_size": 100_000}
    encoders: dict[str, Encoder] = {
        REFERENCE: SentenceEncoder(**kept),
        "OnnxEncoder": OnnxEncoder(**kept),
        "OnnxEncoder, int8": OnnxEncoder(arithmetic="int8", **kept),
        "StaticEncoder": StaticEncoder(static_folder(), cache_size=100_000),
    }
    lines = []
    with tqdm(total=len(tasks) * len(encoders), desc="encoders", unit="fit") as bar:
        for task in tasks:
            train, test = read(task, "train"), read(task, "test")
            routes = {}
            for name, encoder in encoders.items():
                routes[name] = trained(encoder, train)
                lines.append(compared(task, name, routes, test))
                bar.update()
    print_table("Encoders", HEADERS, lines)


def trained(encoder: Encoder, rows: list[Row]) -> DifferentiableRoute:
    """A route that knows all labels."""
    tools = sorted({row.label for row in rows})
    route = DifferentiableRoute("text -> intent", tools=tools, encoder=encoder)
    return RouteFinetune().compile(route, trainset=examples(rows))


def compared(task: str, name: str, routes: dict[str, DifferentiableRoute], test: list[Row]) -> list[str]:
    """One line of the table."""
    texts, labels = [row.text for row in test], np.array([row.label for row in test])
    route, reference = routes[name], routes[REFERENCE]
    vectors, known = route.encoder.encode(texts), reference.encoder.encode(texts)
    own, theirs = decisions(route, vectors), decisions(reference, known)
    right = float((own == labels).mean())
    line = [task, name, f"{100 * right:.1f} ± {100 * half_width(right, len(test)):.1f}", same(own, theirs)]
    if vectors.shape != known.shape or "Onnx" not in name:
        return [*line, "", "", "", ""]
    cosines = (vectors * known).sum(axis=1)[np.linalg.norm(known, axis=1) > 0]
    swapped = [same(decisions(reference, vectors), theirs), same(decisions(route, known), own)]
    return [*line, *swapped, f"{cosines.min():.4f}", f"{cosines.mean():.5f}"]


def decisions(route: DifferentiableRoute, vectors: np.ndarray) -> np.ndarray:
    """The options of a route for vectors, whichever encoder they come from."""
    (field,) = route.fields
    return np.array(field.option_names)[route.head[field.name].logits(vectors).argmax(axis=1)]


def same(one: np.ndarray, other: np.ndarray) -> str:
    """The share of equal decisions."""
    return f"{100 * float((one == other).mean()):.2f}"


if __name__ == "__main__":
    main()
