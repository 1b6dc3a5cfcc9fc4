"""When not to decide: promises kept, requests out of scope, calibration, functions never seen, options added later.

    python benchmarks/risk.py [--pictures FOLDER]

CLINC150 with its out-of-scope requests, BANKING77 and the Berkeley Function-Calling Leaderboard (BFCL). All methods
work from the same frozen sentence vectors. Nothing is tuned here, and nothing was trained on requests out of scope.

A promise is broken if the expected loss of what is kept exceeds the risk. Here the expectation is known: calibration
rows are drawn with replacement from the test requests, and the loss is taken over all of those. "Of the rest" is the
mean loss on one half of the requests after calibration on the other: the noise of that half is in it, so it may exceed
the risk more often than delta allows.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import numpy as np
from common import VECTORS, Row, examples, print_table, read, semantic_router, texts_and_labels
from quality import untrained
from scipy.special import logsumexp
from semantic_router.calibration import Calibrator
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from unseen_options import added_later, encode, functions

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.evaluation.reliability import reliability_figure, risk_coverage, risk_coverage_figure, roc_figure
from dspy_router.learning.familiarity import familiarity
from dspy_router.learning.fit import fit_head
from dspy_router.learning.reliability import Reliability, reliability
from dspy_router.learning.risk import risk_threshold
from dspy_router.learning.rows import TargetRows

RISKS = {0.02: 77, 0.05: 90}  # with the bar for the coverage, %
DELTA, DRAWS = 0.05, 200
HEADERS = (
    "risk", "method", "broken", "bar", "of the rest", "loss", "5 % quantile", "coverage, mean", "bar", "in hindsight",
)  # fmt: skip
OURS, CALIBRATED = "this package's guard", "semantic-router, calibrated confidence >= 1 - risk"

Rule = Callable[[np.ndarray], np.ndarray]  # from the indices of calibration rows to what is kept, bool, of all requests


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder for the figures, as PNG files")
    pictures = parser.parse_args().pictures
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    for dataset, parts in (("clinc150", ("train", "test", "oos_test")), ("banking77", ("train", "test"))):
        encode(encoder, dataset, [row.text for part in parts for row in read(dataset, part)])
    figures, tables = {}, {}
    for dataset in ("clinc150", "banking77"):
        train = read(dataset, "train")
        start = untrained(dataset, train, encoder)
        route = RouteFinetune().compile(start, trainset=examples(train))
        test = unseen(route, dataset, "test")
        tables |= calibration(dataset, start, route, train, test)
        if dataset == "clinc150":
            figures |= promises_and_scope(route, train, [*test, *unseen(route, dataset, "oos_test")])
    figures["reliability"] = reliability_figure(
        {name: table for name, table in tables.items() if "as compiled" in name}
    )
    print_table(
        "Expected calibration error on test rows",
        ("dataset, head", "error", "bar"),
        [[name, f"{table.error:.4f}", "<= 0.02"] for name, table in tables.items()],
    )
    functions(encoder)
    added_later(encoder)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(pictures / f"{name}.png", dpi=150)


def unseen(route: DifferentiableRoute, dataset: str, part: str) -> list[Row]:
    """The rows of a part that the route was not trained on; prints how many were."""
    rows = read(dataset, part)
    kept = [row for row in rows if not route.trained_on(text=row.text)]
    print(f"{dataset}, {part}: {len(rows) - len(kept)} of {len(rows):,} texts are in the training set too; left out")
    return kept


# Promises and scope: CLINC150


@dataclass(frozen=True)
class Judged:
    """Requests as one method decides them: scores, float64 [n], higher being surer, and 0/1 losses, float64 [n]."""

    scores: np.ndarray
    losses: np.ndarray


def promises_and_scope(route: DifferentiableRoute, train: list[Row], rows: list[Row]) -> dict[str, Any]:
    """Print the tables of CLINC150's test rows and requests out of scope, and draw their figures."""
    texts, labels = texts_and_labels(rows)
    in_scope = np.array(labels) != "oos"
    predictions = route.batch([{"text": text} for text in texts])
    losses = wrong([prediction.intent for prediction in predictions], labels)
    confidences = np.array([prediction.confidence for prediction in predictions])
    theirs = router_judged(route, train, rows)
    methods = {
        OURS: Judged(route.score(texts), losses),
        "the guard on the maximum probability": Judged(confidences, losses),
        "the guard on semantic-router's score": theirs,
        CALIBRATED: theirs,
    }
    curves = {name: risk_coverage(method.scores, method.losses, in_scope) for name, method in methods.items()}
    lines = []
    for risk, bar in RISKS.items():
        for name, method in tqdm(methods.items(), desc=f"risk {risk:.0%}: draws", unit="method"):
            rule = calibrated(method, risk) if name == CALIBRATED else guarded(method, risk)
            broken, *cells = drawn(rule, method.losses, in_scope, risk)
            bars = ("<= 5", f">= {bar}") if name == OURS else ("", "")
            best = f"{100 * curves[name].coverage_at(risk):.1f}"
            lines.append([f"{risk:.0%}", name, broken, bars[0], *cells, bars[1], best])
    print_table(
        f"CLINC150's {in_scope.sum():,} test and {(~in_scope).sum():,} out-of-scope requests, delta {DELTA:.0%}, "
        f"{DRAWS} draws of {len(rows) // 2:,} calibration rows, %; coverage is of the requests in scope",
        HEADERS,
        lines,
    )
    guard_once(route, rows, methods[OURS])
    scores = scope_scores(route, texts, methods[OURS].scores)
    print_table(
        "Area under the ROC curve, in scope against out of scope, CLINC150",
        ("score", "area", "bar"),
        [
            [name, f"{roc_auc_score(in_scope, values):.4f}", ">= 0.978" if name == "familiarity" else ""]
            for name, values in scores.items()
        ],
    )
    by_score = dict(zip(("route.score", "maximum probability", "semantic-router"), curves.values(), strict=False))
    return {"risk_coverage": risk_coverage_figure(by_score), "out_of_scope": roc_figure(scores, in_scope)}


def wrong(chosen: list[str], labels: list[str]) -> np.ndarray:
    """Losses: 1 where the choice is not the label, as it never is out of scope."""
    return np.array([choice != label for choice, label in zip(chosen, labels, strict=True)], np.float64)


def router_judged(route: DifferentiableRoute, train: list[Row], rows: list[Row]) -> Judged:
    """semantic-router with all training rows as utterances, before it is calibrated."""
    router = semantic_router(route.encoder, train)
    choices = [router(row.text) for row in tqdm(rows, desc="semantic-router", unit="request")]
    scores = np.array([choice.confidence for choice in choices])
    return Judged(scores, wrong([choice.name for choice in choices], [row.label for row in rows]))


def guarded(method: Judged, risk: float) -> Rule:
    """Keep what scores at least the threshold that the calibration rows allow."""

    def keep(rows: np.ndarray) -> np.ndarray:
        found = risk_threshold(method.scores[rows], method.losses[rows], risk=risk, delta=DELTA)
        return method.scores >= (np.inf if found.threshold is None else found.threshold)

    return keep


def calibrated(method: Judged, risk: float) -> Rule:
    """Keep what is right with probability 1 - risk by the confidence that `router.fit` learns from the same rows."""

    def keep(rows: np.ndarray) -> np.ndarray:
        return Calibrator.fit(method.scores[rows], 1 - method.losses[rows])(method.scores) >= 1 - risk

    return keep


def drawn(rule: Rule, losses: np.ndarray, in_scope: np.ndarray, risk: float) -> list[str]:
    """Broken promises, their estimate on the rest, mean loss, and 5 % quantile and mean of the coverage in scope."""
    count, found, of_the_rest = len(losses), [], []
    for number in range(DRAWS):
        random = np.random.default_rng(number)
        kept = rule(random.integers(count, size=count // 2))
        found.append((loss_of(losses[kept]), kept[in_scope].mean()))
        order = random.permutation(count)
        kept, rest = rule(order[: count // 2]), order[count // 2 :]
        of_the_rest.append(loss_of(losses[rest][kept[rest]]))
    loss, coverage = np.array(found).T
    broken, broken_of_the_rest = (loss > risk).mean(), (np.array(of_the_rest) > risk).mean()
    shares = (broken, broken_of_the_rest, loss.mean(), np.quantile(coverage, 0.05), coverage.mean())
    return [f"{100 * share:.1f}" for share in shares]


def loss_of(kept: np.ndarray) -> float:
    """Mean loss of what is kept; nothing loses nothing."""
    return float(kept.mean()) if len(kept) else 0.0


def guard_once(route: DifferentiableRoute, rows: list[Row], judged: Judged) -> None:
    """`route.guard` itself on half of the requests: the threshold of the draws, and what the route then declines."""
    order = np.random.default_rng(0).permutation(len(rows))
    half, rest = order[: len(rows) // 2], order[len(rows) // 2 :]
    guarded_route = route.deepcopy()
    report = guarded_route.guard(examples([rows[index] for index in half]), metric=same_intent, risk=min(RISKS))
    expected = risk_threshold(judged.scores[half], judged.losses[half], risk=min(RISKS), delta=DELTA)
    # One vector and a batch of them differ in the last digits.
    assert report.threshold is not None
    assert np.isclose(report.threshold, expected.threshold, atol=1e-3)
    assert report.kept == expected.kept
    predictions = guarded_route.batch([{"text": rows[index].text} for index in rest])
    declined = np.array([prediction.decision.abstained for prediction in predictions])
    outside = np.array([rows[index].label == "oos" for index in rest])
    print(f"\n{report.sentence}")
    print(
        f"On the other half it declines {declined[outside].mean():.1%} of the requests out of scope and "
        f"{declined[~outside].mean():.1%} of those in scope; what it keeps loses "
        f"{loss_of(judged.losses[rest][~declined]):.2%}."
    )


def same_intent(example: dspy.Example, prediction: dspy.Prediction) -> bool:
    """Whether the intent is right."""
    return bool(example.intent == prediction.intent)


def scope_scores(route: DifferentiableRoute, texts: list[str], decision_scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores that are to be higher for requests in scope."""
    logits, vectors = route.logits(texts).detach().numpy().astype(np.float64), route.encoder.encode(texts)
    assert route.learned.record is not None
    energy = logsumexp(logits, axis=1)
    return {
        "familiarity": familiarity(route.learned.record.references["intent"], logits, vectors),
        "decision score (route.score)": decision_scores,
        "maximum logit": logits.max(axis=1),
        "maximum probability": logits.max(axis=1) - energy,
        "energy": energy,
    }


# Calibration


def calibration(
    dataset: str, start: DifferentiableRoute, route: DifferentiableRoute, train: list[Row], test: list[Row]
) -> dict[str, Reliability]:
    """Reliability on test rows of a compiled route, and of the head as `fit_head` alone leaves it."""
    names, fitted = start.fields[0].option_names, start.deepcopy()
    (texts, labels), (test_texts, test_labels) = texts_and_labels(train), texts_and_labels(test)
    targets = TargetRows.from_labels(np.array([names.index(label) for label in labels]), len(names))
    fit_head(fitted.head["intent"], start.encoder.encode(texts), targets)
    found = {}
    for name, each in (("as compiled", route), ("at temperature 1", fitted)):
        policy = each.head["intent"].policy(start.encoder.encode(test_texts))
        right = np.array(names)[policy.argmax(axis=1)] == np.array(test_labels)
        found[f"{dataset}, {name}"] = reliability(policy.max(axis=1), right)
    return found


if __name__ == "__main__":
    main()
