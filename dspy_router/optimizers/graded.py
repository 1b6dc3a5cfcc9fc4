"""Graded rewards of tried options as what every option is worth.

The decisions of a run share its reward, so that each is judged by what came of it at the same point of the example's
other runs: see `dspy_router.learning.returns`. A run of one decision is the tree of one.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dspy_router.feedback import Feedback
from dspy_router.learning.evidence import Choice, RunEvidence
from dspy_router.learning.returns import tree_returns
from dspy_router.learning.reward_model import cross_fitted_rewards
from dspy_router.learning.rewards import Tries, option_values
from dspy_router.learning.rows import Objective
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.runs import (
    FieldKey,
    Routes,
    decided_fields,
    open_options,
    option_numbers,
    policies_at,
    runs_of,
)

# A target row by example, text and what else tells it from others of the same two: how it is to be read, the target
# itself, and how much it counts.
TextTargets = dict[tuple[str, str, str], tuple[Objective, np.ndarray, float]]
SMALLEST_REACH = 1e-3  # what the policy so rarely comes to is not learned from


@dataclass(frozen=True)
class FieldValues:
    """What is known of the options of one field, at each of the n decisions that runs came to.

    Attributes:
        key: The field.
        inputs: Example and text of each decision.
        parents: The choice that led to each; None at a run's first decision.
        tries: What was earned, in the reward's own unit; of a decision that others followed, its return.
        predicted: Float [n, k], what a reward model expects that did not see the example.
        values: Float32 [n, k], what each option is worth by both.
        policy: Float32 [n, k], the route's probabilities, 0 for what was no candidate.
        reach: Float [n], how likely the policy comes to the decision.
        noise: Standard deviation of the rewards of runs along the same path; 0 if none was repeated.
    """

    key: FieldKey
    inputs: list[tuple[str, str]]
    parents: list[Choice | None]
    tries: Tries
    predicted: np.ndarray
    values: np.ndarray
    policy: np.ndarray
    reach: np.ndarray
    noise: float


def graded_targets(routes: Routes, tried: Sequence[Feedback], reading: RewardReading) -> dict[FieldKey, TextTargets]:
    """A target row for every decision with a graded reward: what each option is worth, scaled to between 0 and 1.

    A row counts as much as the policy is likely to come to its decision.
    """
    net = [reading.net(row) for row in tried]
    lowest, span = min(net, default=0.0), max(net, default=0.0) - min(net, default=0.0)
    found: dict[FieldKey, TextTargets] = {key: {} for key in decided_fields(routes)}
    if span <= 0:
        return found  # every option earned the same
    for key, values in field_values(routes, tried, reading.net).items():
        scaled = (values.values - lowest) / span
        for row in np.flatnonzero(values.reach > SMALLEST_REACH):
            # A decision met on two paths is kept once for each: the parent is part of its name.
            name = (*values.inputs[row], str(values.parents[row] or ""))
            found[key][name] = (Objective.REWARD, scaled[row], float(values.reach[row]))
    return found


@dataclass(frozen=True)
class RunTree:
    """The runs of all examples as trees of decisions.

    Attributes:
        evidence: The decisions.
        visits: By field, the choices that runs went through, with the feedback row of each and whether it was the last.
        ends: The last choice of every run, and the run's reward.
    """

    evidence: RunEvidence[FieldKey]
    visits: dict[FieldKey, list[tuple[Choice, Feedback, bool]]]
    ends: list[tuple[Choice, float]]


def run_tree(routes: Routes, tried: Sequence[Feedback], worth: Callable[[Feedback], float]) -> RunTree:
    """The trees of the runs that `tried` rows were part of, each run counted as it is `worth`."""
    numbers = option_numbers(routes)
    evidence: RunEvidence[FieldKey] = RunEvidence({key: len(options) for key, options in numbers.items()})
    tree = RunTree(evidence, defaultdict(list), [])
    for run in runs_of(tried):
        choice: Choice | None = None
        for row in run:
            key = (row.route, row.field)
            place = evidence.decision(run[0].example, key, row.text, choice)
            choice = Choice(key, place, numbers[key][row.chosen])
            tree.visits[key].append((choice, row, row is run[-1]))
        if choice is not None:
            tree.ends.append((choice, worth(run[0])))
    return tree


def field_values(
    routes: Routes, tried: Sequence[Feedback], worth: Callable[[Feedback], float]
) -> dict[FieldKey, FieldValues]:
    """What each option is worth, for all fields of which something was tried.

    Args:
        routes: The program's routes by name.
        tried: Rows with a reward.
        worth: What is counted: the net reward of a row, its cost, ...
    """
    tree = run_tree(routes, tried, worth)
    evidence, ends = tree.evidence, tree.ends
    policies = policies_at(routes, evidence, open_options(routes, evidence, tried))
    returns = tree_returns(evidence, ends, policies)
    noise = _noise(ends)
    found = {}
    for key, visited in tree.visits.items():
        mean, decisions = returns[key].mean, evidence.decisions[key]
        tries = Tries(
            group=np.array([choice.row for choice, _, _ in visited]),
            option=np.array([choice.option for choice, _, _ in visited]),
            reward=np.array([worth(row) if last else mean[choice.row, choice.option] for choice, row, last in visited]),
            propensity=np.array(
                [row.propensity if row.has_propensity else np.nan for _, row, _ in visited], np.float64
            ),
        )
        predicted = _predicted(
            routes,
            key,
            [decided.text for decided in decisions],
            [str(decided.example) for decided in decisions],
            tries,
            mean.shape,
        )
        found[key] = FieldValues(
            key=key,
            inputs=[(str(decided.example), decided.text) for decided in decisions],
            parents=[decided.parent for decided in decisions],
            tries=tries,
            predicted=predicted,
            values=option_values(tries, predicted),
            policy=policies[key],
            reach=returns[key].reach,
            noise=noise,
        )
    return found


def _noise(ends: Sequence[tuple[Choice, float]]) -> float:
    """Of all runs, by the paths that several took."""
    paths = {choice: number for number, choice in enumerate(dict.fromkeys(choice for choice, _ in ends))}
    group = np.array([paths[choice] for choice, _ in ends])
    return Tries(group, np.zeros_like(group), np.array([reward for _, reward in ends]), np.ones(len(ends))).noise()


def _predicted(
    routes: Routes, key: FieldKey, texts: list[str], examples: list[str], tries: Tries, shape: tuple[int, ...]
) -> np.ndarray:
    predicted = np.full(shape, tries.reward.mean())
    folds = {example: number for number, example in enumerate(dict.fromkeys(examples))}
    if len(folds) > 1:
        vectors = routes[key[0]].encoder.encode(texts)
        groups = np.array([folds[example] for example in examples])[tries.group]
        # Every try of a decision gets the same prediction: its folds go by example.
        predicted[tries.group] = cross_fitted_rewards(
            vectors[tries.group], tries.option, tries.reward, shape[1], groups
        )
    return predicted
