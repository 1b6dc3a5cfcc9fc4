"""Which rollouts to make next where rewards are graded: a run is not just right or wrong, so its size counts.

Examples never run before take options drawn near the policy, with their propensities. Of the others, those come first
in which another option may well be better than the best so far, by what was earned and by the reward model: with
values v and standard errors e of the two, the chance is (a probability of improvement, Kushner, 1964)

    Φ((v_other - v_best) / √(e_other² + e_best²))

A metric that repeats itself is asked about the likeliest option not tried yet; a noisy one is asked again about
whichever of the two is known less well. Runs with several decisions are drawn whole, the examples in turn, since
their decisions are compared across the runs of an example.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtr

from dspy_router.feedback import Feedback
from dspy_router.optimizers.graded import FieldValues, field_values
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.override import Site
from dspy_router.optimizers.rollouts import Job, KeyedExample
from dspy_router.optimizers.runs import FieldKey, Routes, decided_fields

FRESH_SHARE = 0.5  # of a round, for examples never run before
SMALLEST_CHANCE = 1e-3  # of another option being better, for a rollout to be worth its price


def graded_jobs(
    routes: Routes,
    examples: Sequence[KeyedExample],
    feedback: Sequence[Feedback],
    reading: RewardReading,
    fresh: Sequence[int],
    looks: Mapping[int, int],
    size: int,
) -> list[Job]:
    """The rollouts of the next round, at most `size`."""
    numbers = {entry.key: index for index, entry in enumerate(examples)}
    tried = [row for row in feedback if row.has_reward]
    shared = {numbers[row.example] for row in tried if not row.sole}
    chances: dict[int, tuple[float, tuple[tuple[Site, str], ...]]] = {}
    for key, values in field_values(routes, tried, reading.net).items():
        for row, (chance, option) in enumerate(_improvements(routes, key, values, reading)):
            index = numbers[values.inputs[row][0]]
            if chance > max(SMALLEST_CHANCE, chances.get(index, (0.0, ()))[0]):
                name = decided_fields(routes)[key].option_names[option]
                chances[index] = (chance, ((Site(*key, 0), name),))
    first = list(fresh[: int(np.ceil(FRESH_SHARE * size))])
    jobs = [Job(index, sampled=True) for index in first]
    ranked = sorted((index for index in chances if index not in shared), key=lambda index: -chances[index][0])
    again = [Job(index, chances[index][1]) for index in ranked]
    again += [Job(index, sampled=True) for index in sorted(shared, key=lambda index: looks[index])]
    jobs += again[: size - len(jobs)]
    jobs += [Job(index, sampled=True) for index in fresh[len(first) : len(first) + size - len(jobs)]]
    return jobs


def _improvements(
    routes: Routes, key: FieldKey, values: FieldValues, reading: RewardReading
) -> list[tuple[float, int]]:
    """For each input, the chance that another option is better than the best so far, and the option to look at."""
    mean, looks = values.tries.mean_rewards(values.predicted.shape)
    seen = looks > 0
    noise = values.tries.noise()
    missed = values.tries.reward - values.predicted[values.tries.group, values.tries.option]
    error = np.where(seen, noise / np.sqrt(np.maximum(looks, 1)), missed.std() + 1e-6)
    route = routes[key[0]]
    policy = decided_fields(routes)[key].policy(route, route.encoder.encode([text for _, text in values.inputs]))
    worth = np.where(seen, mean, values.predicted)
    rows = np.arange(len(worth))
    best = np.where(seen, mean, -np.inf).argmax(axis=1)
    others = worth.copy()
    others[rows, best] = -np.inf
    if noise == 0:
        # The next is the likeliest not tried; what was tried is known.
        others = np.where(seen, -np.inf, policy)
    other = others.argmax(axis=1)
    spread = np.sqrt(error[rows, other] ** 2 + error[rows, best] ** 2)
    chance = ndtr((worth[rows, other] - worth[rows, best]) / np.maximum(spread, 1e-9))
    over = np.isneginf(others[rows, other]) | ((noise == 0) & (worth[rows, best] >= reading.enough))
    look = np.where((noise > 0) & (error[rows, best] > error[rows, other]), best, other)
    return list(zip(np.where(over, 0.0, chance).tolist(), look.tolist(), strict=True))
