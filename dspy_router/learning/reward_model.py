"""A reward model: what every option would earn on an input, learned from the options that were taken.

For an input vector x and an option o,

    r̂(x, o) = x·w + c + x·v_o + b_o

in two ridge regressions (Hoerl and Kennard, 1970): w and c on the rewards of all rows, then v_o and b_o on what that
left over in the rows that took o. The penalty draws v_o and b_o to zero, so an option with few rows is predicted
nearly as all options are, and one that was never taken exactly so. How strongly is found for each option by its
leave-one-out error, which a ridge regression gives in closed form.

Estimates of a policy need predictions by a model that did not see the row: `cross_fitted_rewards`. (Chernozhukov et
al., "Double/Debiased Machine Learning for Treatment and Structural Parameters", 2018.)
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from dspy_router.errors import RouteError

# Chosen by squared error on CLINC150's training texts and on prompts that benchmarks/offline.py trains its candidate
# with: from 3 to 30 that moves by less than a tenth.
SHARED_PENALTY = 10.0
# Options differ: those of CLINC150 want 0.1, the two LLMs of RouteLLM 30 and more.
OPTION_PENALTIES = (100.0, 10.0, 1.0, 0.1)


@dataclass(frozen=True)
class RewardModel:
    """A fitted reward model: one linear function an option, within the range of the rewards it was fitted to.

    Attributes:
        weight: Float32 [k, d].
        bias: Float32 [k].
        lowest: The least reward seen.
        highest: The greatest reward seen.
    """

    weight: np.ndarray
    bias: np.ndarray
    lowest: float
    highest: float

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """Predicted reward, float32 [n, k], of every option for input vectors [n, d]."""
        return np.clip(vectors @ self.weight.T + self.bias, self.lowest, self.highest)


def fit_reward_model(vectors: np.ndarray, chosen: np.ndarray, reward: np.ndarray, options: int) -> RewardModel:
    """Fit a reward model to logged rows.

    Args:
        vectors: Float32 [n, d], unit vectors of the inputs, n at least 1.
        chosen: Int [n], the options taken, in [0, options).
        reward: Float [n], finite.
        options: How many options there are, k.

    Raises:
        RouteError: If there are no rows, shapes do not fit, or a reward or an option is out of range.

    Example:
        >>> vectors = np.eye(2, dtype=np.float32)[[0, 1] * 20]
        >>> chosen = np.array([0, 0, 1, 1] * 10)
        >>> reward = np.array([1.0, 0.0, 0.0, 1.0] * 10)  # option 0 suits the first input, option 1 the second
        >>> model = fit_reward_model(vectors, chosen, reward, options=3)
        >>> model.predict(np.eye(2, dtype=np.float32)).round(1)
        array([[1. , 0. , 0.5],
               [0. , 1. , 0.5]], dtype=float32)
    """
    vectors, chosen, reward = _checked(vectors, chosen, reward, options)
    # The bias is one more weight, so that it is drawn to zero as well.
    extended = np.column_stack([vectors, np.ones(len(vectors), np.float32)])
    # These fits are too small to gain from a second thread, and on busy cores one costs ten times as much.
    with threadpool_limits(limits=1, user_api="blas"):
        shared = Ridge(alpha=SHARED_PENALTY).fit(vectors, reward)
        residual = reward - shared.predict(vectors)
        weight = np.tile(shared.coef_, (options, 1))
        bias = np.full(options, shared.intercept_, np.float32)
        for option in np.unique(chosen):
            taken = chosen == option
            own = RidgeCV(OPTION_PENALTIES, fit_intercept=False).fit(extended[taken], residual[taken])
            weight[option] += own.coef_[:-1]
            bias[option] += own.coef_[-1]
    return RewardModel(weight, bias, float(reward.min()), float(reward.max()))


def cross_fitted_rewards(
    vectors: np.ndarray,
    chosen: np.ndarray,
    reward: np.ndarray,
    options: int,
    groups: np.ndarray,
    *,
    folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Predicted reward of every option for each row, by a model fitted to the other folds' rows.

    Args:
        vectors: Float32 [n, d], unit vectors of the inputs.
        chosen: Int [n], the options taken, in [0, options).
        reward: Float [n], finite.
        options: How many options there are, k.
        groups: Int [n]: rows of one group (one example) are in the same fold.
        folds: How many models are fitted; as many as there are groups if those are fewer.
        seed: Draws the folds.

    Returns:
        Float32 [n, k], within the range of the rewards.

    Raises:
        RouteError: If there are fewer than two groups, shapes do not fit, or a reward or an option is out of range.

    Example:
        >>> vectors = np.eye(2, dtype=np.float32)[[0, 1] * 20]
        >>> chosen, groups = np.array([0, 0, 1, 1] * 10), np.arange(40)
        >>> reward = np.array([1.0, 0.0, 0.0, 1.0] * 10)
        >>> predicted = cross_fitted_rewards(vectors, chosen, reward, 2, groups)
        >>> predicted.shape, bool((predicted.argmax(axis=1) == [0, 1] * 20).all())
        ((40, 2), True)
    """
    vectors, chosen, reward = _checked(vectors, chosen, reward, options)
    count = len(np.unique(groups))
    if len(groups) != len(reward) or count < 2 or folds < 2:
        raise RouteError(
            f"{len(groups)} group keys, {count} of them distinct, for {len(reward)} rows in {folds} folds: give one "
            "key a row, and at least two groups and two folds, so that a model can be fitted without the row."
        )
    predicted = np.empty((len(reward), options), np.float32)
    splits = GroupKFold(min(folds, count), shuffle=True, random_state=seed)
    for seen, held_out in splits.split(vectors, groups=groups):
        model = fit_reward_model(vectors[seen], chosen[seen], reward[seen], options)
        predicted[held_out] = model.predict(vectors[held_out])
    return predicted


def _checked(
    vectors: np.ndarray, chosen: np.ndarray, reward: np.ndarray, options: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors, chosen = np.asarray(vectors, np.float32), np.asarray(chosen)
    reward = np.asarray(reward, np.float32)
    if vectors.ndim != 2 or not len(vectors) or not chosen.shape == reward.shape == vectors.shape[:1]:
        raise RouteError(
            f"Shapes do not fit: vectors {vectors.shape}, chosen {chosen.shape}, reward {reward.shape}; expected "
            "[n, d], [n] and [n] with at least one row."
        )
    if not np.isfinite(reward).all():
        row = int(np.flatnonzero(~np.isfinite(reward))[0])
        raise RouteError(f"Row {row} has reward {reward[row]}, which is not finite; leave such rows out.")
    if chosen.min() < 0 or chosen.max() >= options:
        row = int(np.flatnonzero((chosen < 0) | (chosen >= options))[0])
        raise RouteError(f"Row {row} took option {chosen[row]}; expected an index in [0, {options}).")
    return vectors, chosen, reward
