"""Whether heads that learned from graded runs decide better than before, by the runs that were made.

The rows that a head was fitted to flatter it. So the examples are split into folds, heads are fitted to the rows of the
other folds, and their decisions are followed down the tree of each example's runs, as those of the student are: the
difference of what the two earn is paired by example. Where one of them takes a choice that no run took, a reward model
that did not see the example says what it is worth; which examples were tried further depends on how their first runs
went, so that such an example may count against the trained heads, but not for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold

from dspy_router.feedback import Feedback
from dspy_router.heads import OptionHead
from dspy_router.learning.evidence import Choice
from dspy_router.learning.fit import fit_head
from dspy_router.learning.returns import tree_returns
from dspy_router.learning.rows import TargetRows
from dspy_router.optimizers.graded import FieldValues, RunTree, field_values, run_tree
from dspy_router.optimizers.learner import FieldRows
from dspy_router.optimizers.outcomes import TRIED, RewardReading
from dspy_router.optimizers.runs import FieldKey, Routes, open_options, policies_at

FOLDS = 5
GUESSED = 1e-6  # of what a run earns, the share of guesses from which on it is one


@dataclass(frozen=True)
class Replay:
    """Mean reward of the examples' runs as two programs decide.

    Attributes:
        student: As the student decides.
        trained: As heads do that did not learn from the example.
        error: Standard error of their difference, paired by example.
    """

    student: float
    trained: float
    error: float


def replay(
    routes: Routes,
    entries: Sequence[FieldRows],
    feedback: Sequence[Feedback],
    reading: RewardReading,
    seed: int = 0,
) -> Replay | None:
    """Compare trained heads with the student's, in runs of several decisions.

    Args:
        routes: The routes with the student's heads.
        entries: What the trained heads were fitted to.
        feedback: All that was learned from.
        reading: What rewards mean.
        seed: Draws the folds.

    Returns:
        None where the runs do not say: if something else was learned from than graded rollouts of several decisions,
        if an encoder is trained or a list decided, or with fewer than two examples.
    """
    tried = [row for row in feedback if row.source in TRIED and row.has_reward]
    examples = list(dict.fromkeys(row.example for row in tried))
    other = any(row.source != "rollout" for row in feedback)
    if other or len(examples) < 2 or all(row.sole for row in tried) or not reading.graded(tried):
        return None
    if any(entry.route.encoder.trainable or not isinstance(entry.rows, TargetRows) for entry in entries):
        return None
    tree, values = run_tree(routes, tried, reading.net), field_values(routes, tried, reading.net)
    before = policies_at(routes, tree.evidence, open_options(routes, tree.evidence, tried))
    student = {key: policy.argmax(axis=1) for key, policy in before.items()}
    trained = {key: chosen.copy() for key, chosen in student.items()}
    names = {id(route): name for name, route in routes.items()}
    folds = GroupKFold(min(FOLDS, len(examples)), shuffle=True, random_state=seed)
    for _, fold in folds.split(examples, groups=examples):
        held_out = {examples[index] for index in fold}
        for entry in entries:
            key = (names[id(entry.route)], entry.field.name)
            there = np.array([str(decided.example) in held_out for decided in tree.evidence.decisions[key]], bool)
            if there.any():
                trained[key][there] = _chosen(entry, held_out, tree.evidence.texts(key), before[key] > 0)[there]
    earned, known = _followed(tree, values, student)
    earned_after, known_after = _followed(tree, values, trained)
    gain = np.where(known & known_after, earned_after - earned, np.minimum(earned_after - earned, 0.0))
    error = float(gain.std(ddof=1) / len(gain) ** 0.5)
    return Replay(float(earned.mean()), float((earned + gain).mean()), error)


def _chosen(entry: FieldRows, held_out: set[str], texts: list[str], open_: np.ndarray) -> np.ndarray:
    """What a head decides that was fitted to the rows of other examples."""
    fitted = entry.route.head[entry.field.name]
    head = OptionHead(fitted.option_vectors, scale=float(fitted.scale))
    if entry.anchor is not None:
        entry.anchor.put_into(head)
    rest = np.array([example not in held_out for example in entry.examples])
    assert isinstance(entry.rows, TargetRows)
    if rest.any():
        vectors = entry.route.encoder.encode(entry.texts)
        fit_head(head, vectors[rest], entry.rows.part(rest), anchor=entry.anchor)
    logits = head.logits(entry.route.encoder.encode(texts))
    return np.where(open_, logits, -np.inf).argmax(axis=1)


def _followed(
    tree: RunTree, values: Mapping[FieldKey, FieldValues], chosen: Mapping[FieldKey, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What each example's run earns from its first decision on if it goes on as chosen, and whether that was seen."""
    certain = {key: np.eye(tree.evidence.options[key])[options] for key, options in chosen.items()}
    guesses: list[tuple[Choice, float]] = []
    for key, found in values.items():
        _, looks = found.tries.mean_rewards(found.policy.shape)
        untried = np.flatnonzero(looks[np.arange(len(looks)), chosen[key]] == 0).tolist()
        taken = [Choice(key, row, int(chosen[key][row])) for row in untried]
        guesses += [(choice, float(found.predicted[choice.row, choice.option])) for choice in taken]
    starts = [
        Choice(key, row, int(chosen[key][row]))
        for key, found in values.items()
        for row, parent in enumerate(found.parents)
        if parent is None
    ]

    def means(ends: list[tuple[Choice, float]]) -> np.ndarray:
        returns = tree_returns(tree.evidence, ends, certain)
        return np.array([returns[start.field].mean[start.row, start.option] for start in starts])

    guessed = means([*((choice, 0.0) for choice, _ in tree.ends), *((choice, 1.0) for choice, _ in guesses)])
    return means([*tree.ends, *guesses]), guessed < GUESSED
