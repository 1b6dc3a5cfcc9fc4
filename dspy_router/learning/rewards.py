"""From graded rewards to what every option is worth on an input."""

from dataclasses import dataclass

import numpy as np

# An importance weight beyond this says more about luck than about the option (Ionides, "Truncated Importance
# Sampling", 2008).
LARGEST_WEIGHT = 10.0


@dataclass(frozen=True)
class Tries:
    """Graded rewards of single decisions.

    Attributes:
        group: Int [m], the input each try belongs to, in [0, n).
        option: Int [m], the option tried, in [0, k).
        reward: Float [m], finite.
        propensity: Float [m], the probability with which it was drawn; NaN where that is not known, and 1 where it
            was no draw.
    """

    group: np.ndarray
    option: np.ndarray
    reward: np.ndarray
    propensity: np.ndarray

    def mean_rewards(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean reward (NaN where never tried) and number of tries, float [n, k] and int [n, k]."""
        total, looks = np.zeros(shape), np.zeros(shape, np.int32)
        np.add.at(total, (self.group, self.option), self.reward)
        np.add.at(looks, (self.group, self.option), 1)
        with np.errstate(invalid="ignore"):
            return np.where(looks > 0, total / np.maximum(looks, 1), np.nan), looks

    def noise(self) -> float:
        """Standard deviation of a reward about the mean of repeated tries, pooled; 0 if nothing was tried twice."""
        pairs = np.stack([self.group, self.option], axis=1)
        _, index, looks = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
        index = index.reshape(-1)
        freedom = int((looks - 1).sum())
        if freedom == 0:
            return 0.0
        means = np.bincount(index, self.reward) / looks
        return float(np.sqrt(((self.reward - means[index]) ** 2).sum() / freedom))


def option_values(tries: Tries, predicted: np.ndarray) -> np.ndarray:
    """What each option earns on each input: float32 [n, k].

    An option that was tried is worth what it earned on average, another what the reward model predicts. Where an
    input's only try was drawn from a policy with propensity μ, the reward stands for the inputs like it that drew
    another option, as in the doubly robust estimate (Dudík, Langford and Li, 2011):

        r̂(o) + 1[o = a] (r - r̂(a)) / max(μ, 0.1)

    Args:
        tries: At least one for every input.
        predicted: Float [n, k], r̂, from a model that did not see the input.

    Example:
        >>> tries = Tries(np.array([0, 1]), np.array([0, 1]), np.array([1.0, 1.0]), np.array([1.0, 0.5]))
        >>> option_values(tries, np.array([[0.4, 0.5], [0.5, 0.5]])).tolist()
        [[1.0, 0.5], [0.5, 1.5]]
    """
    mean, looks = tries.mean_rewards(predicted.shape)
    values = np.where(looks > 0, mean, predicted)
    alone = looks.sum(axis=1)[tries.group] == 1
    drawn = alone & (tries.propensity > 0) & (tries.propensity < 1)
    group, option = tries.group[drawn], tries.option[drawn]
    weight = np.minimum(1 / tries.propensity[drawn], LARGEST_WEIGHT)
    guess = predicted[group, option]
    values[group, option] = guess + weight * (tries.reward[drawn] - guess)
    return values.astype(np.float32)
