"""Objectives that learn a policy from rewards, one value a row; smaller is better.

Shapes: `logits` float [n, k] with k options; `chosen` int [n], the options taken; `propensity` float [n], the
probabilities with which they were taken, in (0, 1]; `reward` float [n]; results float [n], to be averaged. All are
differentiable in the logits. p is softmax(logits), a an option taken, μ its propensity and r its reward.
"""

import torch
from torch import Tensor


def expected_reward(logits: Tensor, rewards: Tensor) -> Tensor:
    """Minus the policy's expected reward where every option's reward is known: an exact gradient.

        loss = -Σ_o p(o) r(o)

    Args:
        logits: Float [n, k].
        rewards: Float [n, k].

    Example:
        >>> expected_reward(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).tolist()
        [-0.5]
    """
    return -(torch.softmax(logits, dim=1) * rewards).sum(dim=1)


def importance_weights(logits: Tensor, chosen: Tensor, propensity: Tensor) -> Tensor:
    """How much likelier the policy takes what was taken: p(a) / μ.

    Raises:
        ValueError: If a propensity lies outside (0, 1].

    Example:
        >>> importance_weights(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.25])).tolist()
        [2.0]
    """
    wrong = ~((propensity > 0) & (propensity <= 1))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Row {row} has propensity {propensity[row].item()}; a propensity lies in (0, 1]. Leave such rows to an "
            "objective that needs none, such as set_likelihood."
        )
    return taken(torch.softmax(logits, dim=1), chosen) / propensity


def inverse_propensity(logits: Tensor, chosen: Tensor, propensity: Tensor, reward: Tensor) -> Tensor:
    """Inverse propensity scoring: unbiased where every option had a chance (Horvitz and Thompson, 1952).

        loss = -(p(a) / μ) r

    Raises:
        ValueError: If a propensity lies outside (0, 1].

    Example:
        >>> chosen, propensity, reward = torch.tensor([1]), torch.tensor([0.25]), torch.tensor([3.0])
        >>> inverse_propensity(torch.zeros(1, 2), chosen, propensity, reward).tolist()
        [-6.0]
    """
    return -importance_weights(logits, chosen, propensity) * reward


def self_normalized(logits: Tensor, chosen: Tensor, propensity: Tensor, reward: Tensor) -> Tensor:
    """SNIPS: inverse propensity scoring that a constant added to all rewards cannot mislead.

        loss_i = -w_i r_i / mean(w),    w_i = p(a_i) / μ_i

    The mean over rows is minus the self-normalised estimate; it is slightly biased and varies less. (Swaminathan
    and Joachims, "The Self-Normalized Estimator for Counterfactual Learning", 2015.)

    Raises:
        ValueError: If a propensity lies outside (0, 1].

    Example:
        >>> chosen, propensity = torch.tensor([0, 1]), torch.tensor([0.5, 0.25])
        >>> self_normalized(torch.zeros(2, 2), chosen, propensity, torch.tensor([1.0, 1.0])).mean().item()
        -1.0
    """
    weights = importance_weights(logits, chosen, propensity)
    return -weights * reward / weights.mean()


def doubly_robust(logits: Tensor, chosen: Tensor, propensity: Tensor, reward: Tensor, predicted: Tensor) -> Tensor:
    """A reward model, corrected by inverse propensity where it erred.

        loss = -(Σ_o p(o) r̂(o) + (p(a) / μ) (r - r̂(a)))

    Unbiased if either the propensities or the predicted rewards are right. (Dudík, Langford and Li, "Doubly Robust
    Policy Evaluation and Learning", 2011.)

    Args:
        logits: Float [n, k].
        chosen: Int [n].
        propensity: Float [n].
        reward: Float [n].
        predicted: Float [n, k], r̂: each option's predicted reward, from a model that did not see the row.

    Raises:
        ValueError: If a propensity lies outside (0, 1].

    Example:
        >>> chosen, propensity, reward = torch.tensor([1]), torch.tensor([0.5]), torch.tensor([1.0])
        >>> doubly_robust(torch.zeros(1, 2), chosen, propensity, reward, torch.tensor([[0.0, 0.5]])).tolist()
        [-0.75]
    """
    correction = inverse_propensity(logits, chosen, propensity, reward - taken(predicted, chosen))
    return expected_reward(logits, predicted) + correction


def score_function(logits: Tensor, chosen: Tensor, advantage: Tensor) -> Tensor:
    """The score function, for options drawn from the policy itself (Williams, "REINFORCE", 1992).

        loss = -(r - b) log p(a)

    Its gradient, not its value, is that of the expected reward. Each decision of a run is a row with the run's
    advantage.

    Args:
        logits: Float [n, k].
        chosen: Int [n], drawn from softmax(logits).
        advantage: Float [n], rewards less a baseline that does not depend on the row's own draw; see
            `leave_one_out_advantage`.

    Example:
        >>> loss = score_function(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2.0]))
        >>> round(loss.item(), 4)
        1.3863
    """
    return -advantage * taken(torch.log_softmax(logits, dim=1), chosen)


def leave_one_out_advantage(reward: Tensor, example: Tensor) -> Tensor:
    """Each run's reward less the mean reward of the other runs of its example.

    A run that is its example's only one is held against all other runs, and a lone run against 0. (Kool, van Hoof
    and Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.)

    Args:
        reward: Float [m], one a run.
        example: Int [m], which example each run belongs to, from 0.

    Returns:
        Float [m], without gradient.

    Example:
        >>> leave_one_out_advantage(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 0, 0])).tolist()
        [0.75, -0.75, 0.0]
    """
    reward = reward.detach()
    count = torch.bincount(example).to(reward.dtype)[example]
    total = torch.zeros_like(reward).index_add(0, example, reward)[example]
    alone = count == 1
    count = torch.where(alone, float(len(reward)), count)
    total = torch.where(alone, reward.sum(), total)
    return reward - (total - reward) / (count - 1).clamp_min(1)


def entropy(logits: Tensor) -> Tensor:
    """The policy's entropy in nats, between 0 and log k; subtract a share of it to keep the policy exploring.

        H = -Σ_o p(o) log p(o)

    Example:
        >>> round(entropy(torch.zeros(1, 4)).item(), 4)
        1.3863
    """
    return -(torch.softmax(logits, dim=1) * torch.log_softmax(logits, dim=1)).sum(dim=1)


def divergence_from(logits: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the policy from a reference policy, in nats; add a share of it to stay near.

        KL = Σ_o p(o) (log p(o) - log q(o)),    q = softmax(reference)

    Args:
        logits: Float [n, k].
        reference: Float [n, k], the reference policy's logits.

    Example:
        >>> divergence_from(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).abs().item() < 1e-6
        True
    """
    log_ratio = torch.log_softmax(logits, dim=1) - torch.log_softmax(reference, dim=1)
    return (torch.softmax(logits, dim=1) * log_ratio).sum(dim=1)


def taken(values: Tensor, chosen: Tensor) -> Tensor:
    """The entry of each row of `values` [n, k] at its option in `chosen` [n]: float [n].

    Example:
        >>> taken(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0])).tolist()
        [2.0, 3.0]
    """
    return values.gather(1, chosen[:, None]).squeeze(1)
