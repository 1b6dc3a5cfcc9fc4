"""Options a route was not trained on: BFCL's functions, and intents added later. `risk.py` runs this and says more."""

import gzip
import json
from collections.abc import Mapping
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
from common import DATA, accuracy, examples, print_table, read
from quality import untrained
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.guarding.scoring import route_scores
from dspy_router.options import parse_tools

ABSTAINED = 0.1  # of the requests that a function fits
NEW_INTENTS, SEEDS = 30, range(5)  # seed 0 was named before any was tried
UNFIT_BARS = {"irrelevance": 64, "live_irrelevance": 70}
SPARE = {"name": "spare"}  # a route needs two options where a request has one function; it is no candidate


def encode(encoder: SentenceEncoder, what: str, texts: list[str]) -> None:
    """Put the vectors of texts into the encoder's cache."""
    encoder.encode(texts, progress=lambda batches: tqdm(batches, desc=f"{what}: encoding", unit="batch"))


def functions(encoder: SentenceEncoder) -> None:
    """Print how an untrained route chooses among each request's own functions, and how often it declines."""
    parts = {part: requests(part) for part in ("live_multiple", *UNFIT_BARS)}
    texts = [request["text"] for part in parts.values() for request in part]
    tools = [tool for part in parts.values() for request in part for tool in request["functions"]]
    encode(encoder, "bfcl", [*texts, *(text for tool in tools for text in parse_tools([tool])[0].texts), SPARE["name"]])
    found = {
        part: [zero_shot(encoder, request) for request in tqdm(given, desc=f"bfcl: {part}", unit="request")]
        for part, given in parts.items()
    }
    choices, scores = zip(*found["live_multiple"], strict=True)
    right = accuracy(choices, [request["answer"] for request in parts["live_multiple"]])
    threshold = np.quantile(scores, ABSTAINED)
    lines = [["live_multiple: the right function chosen", f"{100 * right:.1f}", ">= 88"]]
    for part, bar in UNFIT_BARS.items():
        share = fmean(score < threshold for _, score in found[part])
        lines.append([f"{part}: declined where {ABSTAINED:.0%} of live_multiple is", f"{100 * share:.1f}", f">= {bar}"])
    print_table("BFCL, zero-shot among each request's own functions, %", ("what", "found", "bar"), lines)


def requests(part: str) -> list[dict[str, Any]]:
    """The rows of a part of BFCL, with the text of the last message."""
    with gzip.open(DATA / "bfcl" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [{**row, "text": row["messages"][-1]["content"]} for row in map(json.loads, file)]


def zero_shot(encoder: SentenceEncoder, request: Mapping[str, Any]) -> tuple[str | None, float]:
    """The function chosen and the decision's score; a request without functions is always declined."""
    if not request["functions"]:
        return None, -np.inf
    route = DifferentiableRoute("request -> function", tools=[*request["functions"], SPARE], encoder=encoder)
    names = [tool["name"] for tool in request["functions"]]
    candidates = {"function": np.array([True] * len(names) + [False])}
    (choice,) = route.top_k(1, request=request["text"], candidates=names)
    return choice, float(route_scores(route, encoder.encode([request["text"]]), candidates)[0])


def added_later(encoder: SentenceEncoder) -> None:
    """Print how a route that was trained without some of CLINC150's intents decides after they were added by name."""
    train, test = read("clinc150", "train"), read("clinc150", "test")
    names = sorted({row.label for row in train})
    found = []
    for seed in tqdm(SEEDS, desc="intents added", unit="draw"):
        new = sorted(np.random.default_rng(seed).permutation(names)[:NEW_INTENTS].tolist())
        old = [row for row in train if row.label not in new]
        route = RouteFinetune().compile(untrained("clinc150", old, encoder), trainset=examples(old))
        added = route.deepcopy()
        added.add_tools(new)
        if seed == SEEDS[0]:
            require_unchanged(route, added, new, [row.text for row in test])
        chosen = [prediction.intent for prediction in added.batch([{"text": row.text} for row in test])]
        pairs = [(choice, row.label) for choice, row in zip(chosen, test, strict=True)]
        of_new, of_old = ([pair for pair in pairs if (pair[1] in new) is kind] for kind in (True, False))
        shares = [accuracy(*zip(*part, strict=True)) for part in (of_new, of_old)]
        found.append((*shares, harmonic_mean(shares)))
    lines = [
        [name, f"{100 * new:.1f}", ">= 80", f"{100 * old:.1f}", f"{mean:.3f}", ">= 0.87"]
        for name, (new, old, mean) in (
            (f"seed {SEEDS[0]}", found[0]),
            (f"mean of {len(SEEDS)} seeds", np.mean(found, axis=0)),
            (f"least of {len(SEEDS)} seeds", np.min(found, axis=0)),
        )
    ]
    print_table(
        f"{NEW_INTENTS} of CLINC150's intents added by name after training on the others: right decisions among all, %",
        ("draw", "new", "bar", "old", "harmonic mean", "bar"),
        lines,
    )


def require_unchanged(route: DifferentiableRoute, added: DifferentiableRoute, new: list[str], texts: list[str]) -> None:
    """Check that masks, adding and removing leave parameters, logits and order of the other options as they were."""
    names, (before, after) = route.fields[0].option_names, (logits_of(each, texts) for each in (route, added))
    assert added.fields[0].option_names == (*names, *new)
    assert np.allclose(after[:, : len(names)], before, atol=1e-4)
    own, larger = route.head["intent"], added.head["intent"]
    assert larger.weight[: len(names)].equal(own.weight)
    assert larger.bias[: len(names)].equal(own.bias)
    assert larger.shared_map.equal(own.shared_map)
    assert larger.temperature.equal(own.temperature)
    removed = added.deepcopy()
    removed.remove_tools(new)
    assert removed.fields[0].option_names == names
    assert removed.head["intent"].weight.equal(own.weight)
    assert np.array_equal(logits_of(removed, texts), before)
    for text in texts:
        masked, policy = added(text=text, candidates=names[:10]).probabilities, added(text=text).probabilities
        assert list(masked) == list(names[:10])
        total = sum(policy[name] for name in masked)
        assert all(np.isclose(masked[name], policy[name] / total) for name in masked)
    assert np.array_equal(logits_of(added, texts), after)
    print_table(
        "Masks, adding and removing options: checked on all of CLINC150's test rows",
        ("what", "others' parameters", "others' logits", "others' order"),
        [[what, "the same", "the same", "the same"] for what in ("add_tools", "remove_tools", "candidates")],
    )


def logits_of(route: DifferentiableRoute, texts: list[str]) -> np.ndarray:
    """Logits [n, k], without their gradient."""
    return route.logits(texts).detach().numpy()
