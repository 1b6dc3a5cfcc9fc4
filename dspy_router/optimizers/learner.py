"""From feedback rows to fitted heads."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from dspy_router.errors import RouteError
from dspy_router.feedback import Feedback
from dspy_router.fields import DecisionField
from dspy_router.learning.fit import LIST_FIT, Anchor, FitSettings, fit_head
from dspy_router.learning.fit_network import NetworkFitSettings, NetworkTask, fit_network
from dspy_router.learning.list_rows import ListRows
from dspy_router.learning.rows import Objective, TargetRows
from dspy_router.optimizers.graded import TextTargets, graded_targets
from dspy_router.optimizers.outcomes import TRIED, RewardReading
from dspy_router.optimizers.runs import FieldKey, Routes, decided_fields, open_options, policies_at, run_evidence
from dspy_router.route import DifferentiableRoute

MOST_OPTIONS = 10_000  # each option is a row with a target for each
SMALLEST_REACH = 1e-3  # what is so unlikely to be part of the right run is not learned from
TELLING = 0.999  # likelihoods that are all at least this say nothing


@dataclass(frozen=True)
class FieldRows:
    """The texts one field's head learns from, the example of each, what is known of it, and what was learned before."""

    route: DifferentiableRoute
    field: DecisionField
    texts: list[str]
    examples: list[str]
    rows: TargetRows | ListRows
    anchor: Anchor | None = None

    def agreement(self) -> float:
        """Weighted mean worth of the options taken: a share right, or a mean reward where rewards are graded.

        Of lists, the share of right answers to whether an option is in the list.
        """
        chosen = self.route.head[self.field.name].chosen(self.route.encoder.encode(self.texts))
        return float(np.average(self.rows.worth(chosen), weights=self.rows.weight))


def require_trainable(routes: Routes) -> None:
    """Refuse routes with more options than a fit has memory for: the rows' targets are dense.

    Raises:
        RouteError: If a field has more than `MOST_OPTIONS`.
    """
    for field in decided_fields(routes).values():
        if len(field.options) > MOST_OPTIONS:
            raise RouteError(
                f"The field {field.name!r} has {len(field.options):,} options; RouteFinetune trains up to "
                f"{MOST_OPTIONS:,}, since memory grows with their square. Untrained, the route decides among them by "
                "their descriptions. To train it, compile a route among the options that have examples, then give it "
                "the others with add_tools."
            )


def learned_before(routes: Routes) -> dict[FieldKey, Anchor]:
    """What the heads have learned by now, by route and output; without trainable encoders and untrained heads.

    A head that something else than `RouteFinetune` has trained counts as one row an option.
    """
    anchors = {}
    for name, route in routes.items():
        for field in () if route.encoder.trainable else route.fields:
            head, record = route.head[field.name], route.learned.record
            if any(bool(parameter.any()) for parameter in head.parameters()):
                rows = len(field.options)
                if record is not None and field.name in record.references:
                    rows = record.references[field.name].rows
                elif record is not None and field.several:
                    rows = len(record.keys) * len(field.options)  # of a list, every option has rows of its own
                anchors[name, field.name] = Anchor.of(head, rows)
    return anchors


def field_rows(
    routes: Routes,
    feedback: Sequence[Feedback],
    reading: RewardReading | None = None,
    anchors: Mapping[FieldKey, Anchor] | None = None,
) -> list[FieldRows]:
    """Feedback as target rows, one entry for every field that has any.

    A label settles its decision whatever else was tried; what was tried comes before a teacher's word.
    """
    reading = reading or RewardReading()
    fields = decided_fields(routes)
    tried = [row for row in feedback if row.source in TRIED and row.has_reward]
    targets: dict[FieldKey, TextTargets] = {key: {} for key in fields}
    labels = [row for row in feedback if row.source in ("label", "synthetic")]
    labelled = {(row.route, row.field, row.example, row.text) for row in labels}
    for row in feedback:
        if row.source == "teacher" and (row.route, row.field, row.example, row.text) not in labelled:
            # Runs of one example may meet a text in other states, or decide differently.
            step = f"{row.run}/{row.occurrence}" if row.run not in ("", row.example) else ""
            _put(targets, row, *_taught(row, fields), step)
    tried_targets = graded_targets if reading.graded(tried) else _outcome_targets
    for key, found in tried_targets(routes, tried, reading).items():
        targets[key].update({name: entry for name, entry in found.items() if (*key, *name[:2]) not in labelled})
    for row in labels:
        _put(targets, row, Objective.LIKELIHOOD, _one_hot(row, fields))
    return [
        joined
        for name, route in routes.items()
        for field in route.fields
        if (
            joined := _field_rows(
                route,
                field,
                [targets[name, single.name] for single in field.decision_fields],
                (anchors or {}).get((name, field.name)),
            )
        )
    ]


def _field_rows(
    route: DifferentiableRoute, field: DecisionField, targets: Sequence[TextTargets], anchor: Anchor | None
) -> FieldRows | None:
    """The rows of a field, by the targets of its decisions; None without any."""
    if not any(targets):
        return None
    if field.several:
        return FieldRows(route, field, *_listed(targets), anchor)
    examples, texts, _ = zip(*targets[0], strict=True)
    return FieldRows(route, field, list(texts), list(examples), _joined(targets[0]), anchor)


def _listed(targets: Sequence[TextTargets]) -> tuple[list[str], list[str], ListRows]:
    """Texts and examples, and what is known of each option: as many rows of both as are known of one option."""
    places: dict[tuple[str, str, int], int] = {}
    entries = []
    for option, found in enumerate(targets):
        met: Counter[tuple[str, str]] = Counter()
        for (example, text, _), entry in found.items():
            row = places.setdefault((example, text, met[example, text]), len(places))
            met[example, text] += 1
            entries.append((row, option, *entry))
    rows = ListRows.unknown(len(places), len(targets))
    for row, option, objective, target, weight in entries:
        rows.objective[row, option], rows.target[row, option], rows.weight[row, option] = objective, target, weight
    return [text for _, text, _ in places], [example for example, _, _ in places], rows


def _outcome_targets(routes: Routes, tried: Sequence[Feedback], reading: RewardReading) -> dict[FieldKey, TextTargets]:
    """What 0/1 rewards say of each decision, given what the policy thinks of a run's other decisions.

    That an option failed speaks for the others if the metric rewards any. Where it never did, nothing is concluded.
    """
    found: dict[FieldKey, TextTargets] = {}
    if not any(map(reading.success, tried)):
        return found
    evidence = run_evidence(routes, tried, reading)
    open_ = open_options(routes, evidence, tried)
    policies, none_right = policies_at(routes, evidence, open_), evidence.none_right(open_, reading.noise)
    for key, posterior in evidence.posterior(policies, reading.noise, none_right).items():
        telling = (posterior.likelihood.min(axis=1, initial=1.0) < TELLING) & (posterior.reach > SMALLEST_REACH)
        entries: TextTargets = {}
        for row in np.flatnonzero(telling):
            decided = evidence.decisions[key][row]
            # A decision met on two paths is kept once for each: the parent is part of its name.
            name = (str(decided.example), decided.text, str(decided.parent or ""))
            weight = 1.0 if decided.parent is None else float(posterior.reach[row])
            entries[name] = (Objective.LIKELIHOOD, posterior.likelihood[row], weight)
        found[key] = entries
    return found


def _put(
    targets: dict[FieldKey, TextTargets], row: Feedback, objective: Objective, target: np.ndarray, step: str = ""
) -> None:
    targets[row.route, row.field][row.example, row.text, step] = (objective, target, row.weight)


def _taught(row: Feedback, fields: Mapping[FieldKey, DecisionField]) -> tuple[Objective, np.ndarray]:
    if row.probabilities is not None:
        names = fields[row.route, row.field].option_names
        soft = np.array([row.probabilities.get(name, 0.0) for name in names], np.float32)
        if soft.sum() > 0:
            return Objective.DISTRIBUTION, soft / soft.sum()
    return Objective.LIKELIHOOD, _one_hot(row, fields)


def _one_hot(row: Feedback, fields: Mapping[FieldKey, DecisionField]) -> np.ndarray:
    names = fields[row.route, row.field].option_names
    return np.array([name == row.chosen for name in names], np.float32)


def _joined(found: TextTargets) -> TargetRows:
    objectives, targets, weights = zip(*found.values(), strict=True)
    return TargetRows(np.stack(targets).astype(np.float32), np.array(objectives, np.int8), np.array(weights, "f4"))


def fit_routes(
    rows: Sequence[FieldRows],
    validation: Sequence[FieldRows] = (),
    *,
    settings: FitSettings | None = None,
    seed: int = 0,
) -> None:
    """Fit the heads of all fields that have rows; token encoders are fitted together with their heads."""
    by_field = {id(entry.route.head[entry.field.name]): entry for entry in validation}
    networks: dict[int, list[FieldRows]] = defaultdict(list)
    for entry in rows:
        if entry.route.encoder.trainable:
            networks[id(entry.route.encoder)].append(entry)
            continue
        head = entry.route.head[entry.field.name]
        held_out = by_field.get(id(head))
        with tqdm(desc=f"fitting {entry.field.name}", unit="iteration", delay=2, leave=False) as bar:
            fit_head(
                head,
                entry.route.encoder.encode(entry.texts),
                entry.rows,
                validation=(held_out.route.encoder.encode(held_out.texts), held_out.rows) if held_out else None,
                anchor=entry.anchor,
                settings=_for_rows(settings, entry.rows),
                on_block=bar.update,
            )
    for entries in networks.values():
        encoder = entries[0].route.encoder
        tasks = [
            NetworkTask(entry.route.head[entry.field.name], encoder.token_ids(entry.texts), entry.rows)  # type: ignore[attr-defined]
            for entry in entries
        ]
        with tqdm(desc="fitting the token encoder", unit="epoch", delay=2, leave=False) as bar:
            fit_network(encoder.network, tasks, settings=NetworkFitSettings(seed=seed), on_epoch=bar.update)  # type: ignore[attr-defined]


def _for_rows(settings: FitSettings | None, rows: TargetRows | ListRows) -> FitSettings | None:
    """Settings as given; of a list, how hard weights and biases are pulled is its own."""
    if settings is None or not isinstance(rows, ListRows):
        return settings
    return replace(settings, penalty=LIST_FIT.penalty, bias_penalty=LIST_FIT.bias_penalty)


def agreement(rows: Sequence[FieldRows]) -> float:
    """Share of decisions about which something is known that the heads get right."""
    counts = [len(entry.rows) for entry in rows]
    return sum(entry.agreement() * count for entry, count in zip(rows, counts, strict=True)) / max(1, sum(counts))
