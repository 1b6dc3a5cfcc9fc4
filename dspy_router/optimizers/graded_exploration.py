"""Which rollouts to make next where rewards are graded: a run is not just right or wrong, so its size counts.

Examples never run before take options drawn near the policy, with their propensities; once runs turn out to have
several decisions, the policy's likeliest, since a run in which each is drawn is hardly ever right as a whole. Of the
other examples, those come first of which a run may well be better than the best so far if it takes another option at
one of its decisions, by what was earned and by the reward model: with values v and standard errors e of the two, the
chance is (a probability of improvement, Kushner, 1964)

    Φ((v_other - v_best) / √(e_other² + e_best²))

A metric that repeats itself is asked about the likeliest option not tried yet; a noisy one is asked again about
whichever of the two is known less well. The rollout forces the decisions that lead to the choice and the choice itself;
what follows is the policy's.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtr

from dspy_router.learning.evidence import Choice
from dspy_router.feedback import Feedback
from dspy_router.optimizers.graded import FieldValues, field_values
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.rollouts import Job, KeyedExample
from dspy_router.optimizers.runs import FieldKey, Routes, forced_path

FRESH_SHARE = 0.5  # of a round, for examples never run before
SMALLEST_CHANCE = 1e-3  # of another option being better, for a rollout to be worth its price


def graded_jobs(
    routes: Routes,
    examples: Sequence[KeyedExample],
    feedback: Sequence[Feedback],
    reading: RewardReading,
    fresh: Sequence[int],
    size: int,
) -> list[Job]:
    """The rollouts of the next round, at most `size`."""
    numbers = {entry.key: index for index, entry in enumerate(examples)}
    tried = [row for row in feedback if row.has_reward]
    values = field_values(routes, tried, reading.net)
    best: dict[int, tuple[float, Choice]] = {}
    for chance, choice in _improvements(values, reading):
        index = numbers[values[choice.field].inputs[choice.row][0]]
        if chance > max(SMALLEST_CHANCE, best.get(index, (0.0, choice))[0]):
            best[index] = (chance, choice)
    drawn = all(row.sole for row in tried)
    first = list(fresh[: int(np.ceil(FRESH_SHARE * size))])
    jobs = [Job(index, sampled=drawn) for index in first]
    ranked = sorted(best, key=lambda index: -best[index][0])[: size - len(jobs)]
    jobs += [Job(index, forced_path(routes, _path(values, best[index][1]))) for index in ranked]
    jobs += [Job(index, sampled=drawn) for index in fresh[len(first) : len(first) + size - len(jobs)]]
    return jobs


def _improvements(values: Mapping[FieldKey, FieldValues], reading: RewardReading) -> list[tuple[float, Choice]]:
    """For each decision, the choice to look at, and the chance that an example's run is better for another option."""
    known = {key: _known(found) for key, found in values.items()}
    improvements = []
    for key, found in values.items():
        worth, error, seen = known[key]
        rows, noise = np.arange(len(worth)), found.noise
        # The best there is so far is what the run's first decision is worth.
        starts = [_path(values, Choice(key, int(row), 0))[0] for row in rows]
        tried = [np.where(known[start.field][2][start.row], known[start.field][0][start.row], -np.inf) for start in starts]
        options = [int(found_there.argmax()) for found_there in tried]
        best = np.array([known[start.field][0][start.row, option] for start, option in zip(starts, options, strict=True)])
        doubt = np.array([known[start.field][1][start.row, option] for start, option in zip(starts, options, strict=True)])
        own = np.where(seen, worth, -np.inf).argmax(axis=1)
        others = np.where(found.policy > 0, worth, -np.inf)
        others[rows, own] = -np.inf
        if noise == 0:
            # The next is the likeliest not tried; what was tried is known.
            others = np.where(seen | (found.policy <= 0), -np.inf, found.policy)
        other = others.argmax(axis=1)
        spread = np.sqrt(error[rows, other] ** 2 + doubt**2)
        chance = ndtr((worth[rows, other] - best) / np.maximum(spread, 1e-9))
        over = np.isneginf(others[rows, other]) | ((noise == 0) & (best >= reading.best_reward))
        look = np.where((noise > 0) & (error[rows, own] > error[rows, other]), own, other)
        chance = np.where(over, 0.0, chance)
        improvements += [(float(chance[row]), Choice(key, int(row), int(look[row]))) for row in rows]
    return improvements


def _known(found: FieldValues) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every option is worth, how far that may be off, and whether it was tried: [n, k] each."""
    mean, looks = found.tries.mean_rewards(found.policy.shape)
    missed = found.tries.reward - found.predicted[found.tries.group, found.tries.option]
    seen = looks > 0
    error = np.where(seen, found.noise / np.sqrt(np.maximum(looks, 1)), missed.std() + 1e-6)
    return np.where(seen, mean, found.predicted), error, seen


def _path(values: Mapping[FieldKey, FieldValues], choice: Choice) -> list[Choice]:
    """The choices of a run from its first decision to this choice."""
    path, step = [choice], values[choice.field].parents[choice.row]
    while step is not None:
        path.append(step)
        step = values[step.field].parents[step.row]
    return path[::-1]
