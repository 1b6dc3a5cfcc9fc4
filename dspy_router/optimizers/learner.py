"""From feedback rows to fitted heads."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from dspy_router.feedback import Feedback
from dspy_router.fields import DecisionField
from dspy_router.learning.fit import FitSettings, fit_head
from dspy_router.learning.fit_network import NetworkFitSettings, NetworkTask, fit_network
from dspy_router.learning.rows import TargetRows
from dspy_router.learning.trials import rows_from_trials
from dspy_router.route import DifferentiableRoute

Routes = Mapping[str, DifferentiableRoute]


@dataclass(frozen=True)
class FieldRows:
    """The texts one field's head learns from, and what is known of each."""

    route: DifferentiableRoute
    field: DecisionField
    texts: list[str]
    rows: TargetRows

    def agreement(self) -> float:
        """Weighted share of rows in which the likeliest option is the likeliest of those that may be right."""
        policy = self.route.head[self.field.name].policy(self.route.encoder.encode(self.texts))
        chosen = policy.argmax(axis=1)
        right = self.rows.possible[np.arange(len(chosen)), chosen]
        soft = self.rows.soft.sum(axis=1) > 0
        right = np.where(soft, self.rows.soft.argmax(axis=1) == chosen, right)
        return float(np.average(right, weights=self.rows.weight))


def field_rows(routes: Routes, feedback: Iterable[Feedback], *, best_reward: float = 1.0) -> list[FieldRows]:
    """Feedback as target rows, one entry for every field that has any.

    A label settles its decision whatever else was tried. Then rollouts: a run that reached the best reward
    shows that all its decisions were right; one that did not says something only if it had a single decision.
    Then the teacher's probabilities or, where it gives none, its choice.
    """
    by_field: dict[tuple[str, str], list[Feedback]] = defaultdict(list)
    for row in feedback:
        by_field[row.route, row.field].append(row)
    found = []
    for name, route in routes.items():
        for field in route.fields:
            if rows := by_field.get((name, field.name)):
                texts, targets = _target_rows(rows, field.option_names, best_reward)
                if len(targets):
                    found.append(FieldRows(route, field, texts, targets))
    return found


def _target_rows(rows: Sequence[Feedback], options: Sequence[str], best: float) -> tuple[list[str], TargetRows]:
    number = {option: index for index, option in enumerate(options)}
    groups: dict[tuple[str, int, str], int] = {}
    texts: list[str] = []
    tries: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    soft: dict[int, np.ndarray] = {}
    for row in rows:
        key = (row.example, row.occurrence, row.text)
        if key not in groups:
            groups[key] = len(groups)
            texts.append(row.text)
        if row.source == "rollout" and row.reward < best and not row.sole:
            continue
        reward = row.reward if row.source == "rollout" else best
        tries[row.source].append((groups[key], number[row.chosen], reward))
        if row.probabilities is not None:
            soft[groups[key]] = np.array([row.probabilities.get(option, 0.0) for option in options], np.float32)
    possible = np.ones((len(groups), len(options)), dtype=bool)
    known = np.zeros(len(groups), dtype=bool)
    settled = np.zeros(len(groups), dtype=bool)
    # Later sources overrule earlier ones.
    for source in ("teacher", "rollout", "label"):
        if tries[source]:
            columns = [np.array(column) for column in zip(*tries[source], strict=True)]
            found, index = rows_from_trials(*columns, shape=(len(groups), len(options)), best_reward=best)
            possible[index], known[index] = found.possible, True
            if source != "teacher":
                settled[index] |= found.possible.sum(axis=1) == 1
    target = np.zeros((len(groups), len(options)), dtype=np.float32)
    for group, probabilities in soft.items():
        if not settled[group] and probabilities.sum() > 0:
            target[group] = probabilities / probabilities.sum()
            possible[group], known[group] = True, True
    kept = np.flatnonzero(known)
    weight = np.ones(len(kept), np.float32)
    return [texts[index] for index in kept], TargetRows(possible[kept], target[kept], weight)


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
                settings=settings,
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
