"""Graded rewards of tried options as what every option is worth."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dspy_router.feedback import Feedback
from dspy_router.learning.reward_model import cross_fitted_rewards
from dspy_router.learning.rewards import Tries, option_values, weighted_advantages
from dspy_router.learning.rows import Objective
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.runs import FieldKey, Routes, decided_fields, option_numbers, runs_of

# A target row by example, text and what else tells it from others of the same two: how it is to be read, the target
# itself, and how much it counts.
TextTargets = dict[tuple[str, str, str], tuple[Objective, np.ndarray, float]]


@dataclass(frozen=True)
class FieldValues:
    """What is known of the options of one field where each reward speaks of one decision.

    Attributes:
        inputs: Example and text of each of the n inputs.
        tries: What was earned, in the reward's own unit.
        predicted: Float [n, k], what a reward model expects that did not see the input.
        values: Float32 [n, k], what each option is worth by both.
    """

    inputs: list[tuple[str, str]]
    tries: Tries
    predicted: np.ndarray
    values: np.ndarray


def graded_targets(routes: Routes, tried: Sequence[Feedback], reading: RewardReading) -> dict[FieldKey, TextTargets]:
    """A target row for every input with a graded reward.

    Where a reward speaks of one decision, the row holds what each option is worth (`option_values`). The
    decisions of a run that share its reward are a row each, with the run's advantage over the example's other runs
    weighed by the decision's own propensity (`weighted_advantages`). Rewards are scaled to between 0 and 1.
    """
    net = [reading.net(row) for row in tried]
    lowest, span = min(net, default=0.0), max(net, default=0.0) - min(net, default=0.0)
    found: dict[FieldKey, TextTargets] = {key: {} for key in decided_fields(routes)}
    if span <= 0:
        return found  # every option earned the same
    for key, values in field_values(routes, tried, reading.net).items():
        scaled = (values.values - lowest) / span
        found[key] = {(*name, ""): (Objective.REWARD, scaled[row], 1.0) for row, name in enumerate(values.inputs)}
    shared = [run for run in runs_of(tried) if not run[0].sole]
    decisions = [(number, row) for number, run in enumerate(shared) for row in run if row.has_propensity]
    if decisions:
        numbers = option_numbers(routes)
        examples = {example: number for number, example in enumerate(dict.fromkeys(run[0].example for run in shared))}
        worth = weighted_advantages(
            np.array([(reading.net(run[0]) - lowest) / span for run in shared]),
            np.array([examples[run[0].example] for run in shared]),
            np.array([number for number, _ in decisions]),
            np.array([row.propensity for _, row in decisions]),
        )
        for (number, row), value in zip(decisions, worth.tolist(), strict=True):
            options = numbers[row.route, row.field]
            target = np.zeros(len(options), np.float32)
            target[options[row.chosen]] = value
            name = (row.example, row.text, f"{number}/{row.occurrence}")
            found[row.route, row.field][name] = (Objective.REWARD, target, 1.0)
    return found


def field_values(
    routes: Routes, tried: Sequence[Feedback], worth: Callable[[Feedback], float]
) -> dict[FieldKey, FieldValues]:
    """What each option is worth, for the fields with rewards that speak of one decision.

    Args:
        routes: The program's routes by name.
        tried: Rows with a reward.
        worth: What is counted: the net reward of a row, its cost, ...
    """
    by_field: dict[FieldKey, list[Feedback]] = defaultdict(list)
    for row in tried:
        if row.sole:
            by_field[row.route, row.field].append(row)
    numbers = option_numbers(routes)
    return {key: _values(routes, key, rows, numbers[key], worth) for key, rows in by_field.items()}


def _values(
    routes: Routes, key: FieldKey, rows: Sequence[Feedback], numbers: dict[str, int], worth: Callable[[Feedback], float]
) -> FieldValues:
    inputs: dict[tuple[str, str], int] = {}
    for row in rows:
        inputs.setdefault((row.example, row.text), len(inputs))
    tries = Tries(
        group=np.array([inputs[row.example, row.text] for row in rows]),
        option=np.array([numbers[row.chosen] for row in rows]),
        reward=np.array([worth(row) for row in rows]),
        propensity=np.array([row.propensity if row.has_propensity else np.nan for row in rows], np.float64),
    )
    predicted = np.full((len(inputs), len(numbers)), tries.reward.mean())
    if len(inputs) > 1:
        vectors = routes[key[0]].encoder.encode([text for _, text in inputs])
        # Every try of an input gets the same prediction: its folds go by input.
        predicted[tries.group] = cross_fitted_rewards(
            vectors[tries.group], tries.option, tries.reward, len(numbers), tries.group
        )
    return FieldValues(list(inputs), tries, predicted, option_values(tries, predicted))
