"""From tries and their rewards to target rows, and from the policy to the try worth most next."""

import numpy as np

from dspy_router.learning.rows import TargetRows


def rows_from_trials(
    group: np.ndarray,
    option: np.ndarray,
    reward: np.ndarray,
    *,
    shape: tuple[int, int],
    best_reward: float = 1.0,
    worst_reward: float = 0.0,
) -> tuple[TargetRows, np.ndarray]:
    """What tries say about the right option of each group (a group is one input).

    Options that reached the best reward are the right ones. Where none did, the right option may be any that
    was not tried, or the best of those tried unless it earned the worst reward there is: everything tried that
    did worse is ruled out. For 0/1 rewards this is exact partial feedback; for graded rewards it uses the
    order of the rewards and not their size.

    Args:
        group: Int [m], the input each try belongs to, in [0, n).
        option: Int [m], the option tried, in [0, k).
        reward: Float [m].
        shape: (n, k).
        best_reward: A try that earns this or more settles its group.
        worst_reward: A try that earns this or less is ruled out.

    Returns:
        Rows for the groups about which something is known, and their indices, int [r].

    Example:
        >>> rows, known = rows_from_trials(np.array([0, 2]), np.array([1, 0]), np.array([1.0, 0.0]), shape=(3, 3))
        >>> known.tolist(), rows.possible.tolist()
        ([0, 2], [[False, True, False], [False, True, True]])
    """
    highest = np.full(shape, -np.inf)
    np.maximum.at(highest, (group, option), reward)
    tried = np.isfinite(highest)
    top = highest.max(axis=1, keepdims=True)
    settled = top >= best_reward
    possible = np.where(settled, highest >= best_reward, ~tried | ((highest >= top) & (highest > worst_reward)))
    informative = np.flatnonzero(possible.any(axis=1) & ~possible.all(axis=1))
    count = len(informative)
    return TargetRows(
        possible[informative], np.zeros((count, shape[1]), np.float32), np.ones(count, np.float32)
    ), informative


def next_options(probabilities: np.ndarray, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each input, the likeliest option not tried yet and how likely it is to be the right one.

    The probability is that of the option given that none of those tried is right:
    p(o) / (1 - Σ_{tried} p). Ties go to the option declared first.

    Args:
        probabilities: Float [n, k], the policy.
        tried: Bool [n, k].

    Returns:
        Options, int [n], and probabilities, float [n]; an input whose options are all tried gets -1 and 0.

    Example:
        >>> option, chance = next_options(np.array([[0.5, 0.3, 0.2]]), np.array([[True, False, False]]))
        >>> option.tolist(), chance.round(2).tolist()
        ([1], [0.6])
    """
    left = np.where(tried, 0.0, probabilities)
    total = left.sum(axis=1)
    option = np.where(tried.all(axis=1), -1, np.where(tried, -1.0, probabilities).argmax(axis=1))
    chance = np.where(total > 0, left.max(axis=1) / np.where(total > 0, total, 1.0), 0.0)
    return option, np.where(option < 0, 0.0, chance)
