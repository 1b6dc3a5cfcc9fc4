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
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from dspy_router.feedback import Feedback
from dspy_router.learning.evidence import Choice
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
    drawn = all(row.sole for row in tried)
    best: dict[int, tuple[float, Choice]] = {}
    for chance, choice in _improvements(values, reading):
        index = numbers[values[choice.field].inputs[choice.row][0]]
        # While no run of several decisions was right as a whole, the reward model knows of nothing better.
        if (chance > SMALLEST_CHANCE or not drawn) and chance > best.get(index, (-1.0, choice))[0]:
            best[index] = (chance, choice)
    first = list(fresh[: int(np.ceil(FRESH_SHARE * size))])
    jobs = [Job(index, sampled=drawn) for index in first]
    ranked = sorted(best, key=lambda index: -best[index][0])[: size - len(jobs)]
    jobs += [Job(index, forced_path(routes, _path(values, best[index][1]))) for index in ranked]
    jobs += [Job(index, sampled=drawn) for index in fresh[len(first) : len(first) + size - len(jobs)]]
    return jobs


def _improvements(values: Mapping[FieldKey, FieldValues], reading: RewardReading) -> list[tuple[float, Choice]]:
    """The choice to look at for each decision with any left, and the chance that a run is better for another option."""
    known = {key: _Known.of(found) for key, found in values.items()}
    improvements = []
    for key, found in values.items():
        own, rows, noise = known[key], np.arange(len(found.policy)), found.noise
        # The best there is so far is what the run's first decision is worth.
        starts = [_path(values, Choice(key, int(row), 0))[0] for row in rows]
        best = np.array([known[start.field].worth[start.row, known[start.field].best[start.row]] for start in starts])
        doubt = np.array([known[start.field].error[start.row, known[start.field].best[start.row]] for start in starts])
        others = own.worth.copy()
        others[rows, own.best] = -np.inf
        if noise == 0:
            # The next is the likeliest not tried; what was tried is known.
            others = np.where(own.seen, -np.inf, found.policy)
        others = np.where(found.policy > 0, others, -np.inf)
        other = others.argmax(axis=1)
        spread = np.sqrt(own.error[rows, other] ** 2 + doubt**2)
        chance = ndtr((own.worth[rows, other] - best) / np.maximum(spread, 1e-9))
        over = np.isneginf(others[rows, other]) | ((noise == 0) & (best >= reading.enough))
        look = np.where((noise > 0) & (own.error[rows, own.best] > own.error[rows, other]), own.best, other)
        improvements += [(float(chance[row]), Choice(key, int(row), int(look[row]))) for row in np.flatnonzero(~over)]
    return improvements


@dataclass(frozen=True)
class _Known:
    """What every option is worth, how far that may be off and whether it was tried, [n, k]; the best tried, [n]."""

    worth: np.ndarray
    error: np.ndarray
    seen: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, found: FieldValues) -> "_Known":
        mean, looks = found.tries.mean_rewards(found.policy.shape)
        missed = found.tries.reward - found.predicted[found.tries.group, found.tries.option]
        seen = looks > 0
        error = np.where(seen, found.noise / np.sqrt(np.maximum(looks, 1)), missed.std() + 1e-6)
        worth = np.where(seen, mean, found.predicted)
        return cls(worth, error, seen, np.where(seen, mean, -np.inf).argmax(axis=1))


def _path(values: Mapping[FieldKey, FieldValues], choice: Choice) -> list[Choice]:
    """The choices of a run from its first decision to this choice."""
    path, step = [choice], values[choice.field].parents[choice.row]
    while step is not None:
        path.append(step)
        step = values[step.field].parents[step.row]
    return path[::-1]
