"""Feedback rows as runs: which rows one reward speaks of, and the decisions they went through."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress

import dspy
import numpy as np

from dspy_router.clients.decision_client import DecisionClient, named_routes
from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback
from dspy_router.fields import DecisionField
from dspy_router.learning.evidence import Choice, RunEvidence
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.override import Site
from dspy_router.route import DifferentiableRoute

Routes = Mapping[str, DifferentiableRoute]
FieldKey = tuple[str, str]  # a route's name in the program, and the field it decides


def find_routes(program: dspy.Module) -> dict[str, DifferentiableRoute]:
    """`named_routes`, of which there must be some.

    Raises:
        RouteError: If there is none.
    """
    routes = named_routes(program)
    if not routes:
        raise RouteError(
            f"The program {type(program).__name__} holds no DifferentiableRoute. Put one in, for example with "
            "replace_predictor(program, path), or give a predictor a DecisionClient as its lm."
        )
    return routes


def bind_clients(program: dspy.Module) -> None:
    """Give every predictor that a `DecisionClient` answers a client with a route of its own, for it to be trained.

    Clients are looked for where DSPy does: at the predictor, then in the settings. One that has a route already is
    shared by its predictors, and copied where it comes from the settings: those are not the program's. A predictor
    that the settings' client cannot answer is passed by: the program calls it with another LM.

    Raises:
        RouteError: If an output of a predictor with a client of its own is no decision.
    """
    copies: dict[int, DecisionClient] = {}
    for _, predictor in program.named_sub_modules(type_=dspy.Predict):
        client = predictor.lm or dspy.settings.lm
        if not isinstance(client, DecisionClient):
            continue
        if client.route is None:
            with suppress(RouteError) if predictor.lm is None else nullcontext():
                predictor.lm = client.with_route(predictor)
        elif predictor.lm is None:
            predictor.lm = copies.setdefault(id(client), copy.deepcopy(client))


def decided_fields(routes: Routes) -> dict[FieldKey, DecisionField]:
    """Everything that some route decides, a list as a boolean for each of its options."""
    return {(name, field.name): field for name, route in routes.items() for field in route.decision_fields}


def option_numbers(routes: Routes) -> dict[FieldKey, dict[str, int]]:
    """Each field's options by name, as indices in declaration order."""
    return {
        key: {name: index for index, name in enumerate(field.option_names)}
        for key, field in decided_fields(routes).items()
    }


def runs_of(rows: Iterable[Feedback]) -> list[list[Feedback]]:
    """Rows that one reward speaks of, together: a run's decisions in order, or one decision rewarded itself."""
    runs: dict[str | int, list[Feedback]] = {}
    for number, row in enumerate(rows):
        # Not by example as well: a log's key is made from the text, and the decisions of a run may read different ones.
        runs.setdefault(number if row.sole or not row.run else row.run, []).append(row)
    return list(runs.values())


def run_evidence(routes: Routes, tried: Iterable[Feedback], reading: RewardReading) -> RunEvidence[FieldKey]:
    """The outcomes of all runs that earned a reward, by example and path."""
    numbers = option_numbers(routes)
    evidence: RunEvidence[FieldKey] = RunEvidence({key: len(options) for key, options in numbers.items()})
    for run in runs_of(tried):
        path = [((row.route, row.field), row.text, numbers[row.route, row.field][row.chosen]) for row in run]
        evidence.observe(run[0].example, path, success=reading.success(run[0]))
    return evidence


def open_options(
    routes: Routes, evidence: RunEvidence[FieldKey], tried: Iterable[Feedback]
) -> dict[FieldKey, np.ndarray]:
    """The options, bool [n, k], that could be chosen at every decision in the evidence: its candidates.

    Those of a log say nothing here: options may have been added since.
    """
    rollouts = [row for row in tried if row.source == "rollout"]
    seen = {(row.route, row.field, row.example, row.text): row.candidates for row in rollouts}
    found = {}
    for key, options in option_numbers(routes).items():
        found[key] = np.ones((len(evidence.decisions[key]), len(options)), bool)
        for mask, decided in zip(found[key], evidence.decisions[key], strict=True):
            candidates = seen.get((*key, str(decided.example), decided.text))
            if candidates and len(candidates) < len(options):
                mask[:] = np.isin(list(options), candidates)
    return found


def policies_at(
    routes: Routes, evidence: RunEvidence[FieldKey], open_: Mapping[FieldKey, np.ndarray]
) -> dict[FieldKey, np.ndarray]:
    """The routes' probabilities, float32 [n, k], of what is open at every decision in the evidence."""
    found = {}
    for key, field in decided_fields(routes).items():
        route = routes[key[0]]
        # The candidates of a boolean, such as whether an option is in a list, are always both.
        candidates = open_[key] if field.kind == "choice" else None
        vectors = route.encoder.encode(evidence.texts(key))
        found[key] = field.policy(route, vectors, candidates).astype(np.float32)
    return found


def forced_path(routes: Routes, path: Sequence[Choice]) -> tuple[tuple[Site, str], ...]:
    """The choices of a run from its first decision on, as a rollout is told of them."""
    fields = decided_fields(routes)
    calls: Counter[FieldKey] = Counter()
    forced = []
    for step in path:
        route, field = step.field
        forced.append((Site(route, field, calls[step.field]), fields[step.field].option_names[step.option]))
        calls[step.field] += 1
    return tuple(forced)
