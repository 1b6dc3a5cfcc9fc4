"""Losses of a policy given by logits, one value a row; smaller is better.

Shapes: `logits` float [n, k]; results float [n]. All are differentiable in the logits.
"""

import torch
from torch import Tensor


def partial_likelihood(logits: Tensor, likelihood: Tensor) -> Tensor:
    """Minus the log-likelihood of what was observed, summed over which option may be the right one.

        loss = -log Σ_o p(o) L(o),    p = softmax(logits)

    L(o) is the likelihood of the observations if o is the right option. L = 1 at one option and 0 elsewhere makes
    it cross-entropy with a gold label. After tries that earned nothing, L = 0 at what was tried and 1 elsewhere: the
    likelihood of 0/1 partial feedback. Rewards that are sometimes wrong give values between. (Learning from
    candidate labels: Jin and Ghahramani, "Learning with Multiple Labels", 2002.)

    Args:
        logits: Float [n, k].
        likelihood: Float [n, k], non-negative, at least one entry a row positive.

    Raises:
        ValueError: If a row rules out every option.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> likelihood = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        >>> partial_likelihood(logits, likelihood).exp().round(decimals=4).tolist()
        [4.0, 2.0]
    """
    if not bool((likelihood > 0).any(dim=1).all()):
        raise ValueError("likelihood rules out every option in a row; leave such rows out.")
    return logits.logsumexp(dim=1) - (logits + likelihood.log()).logsumexp(dim=1)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with a teacher's distribution (Hinton et al., "Distilling the Knowledge", 2015).

        loss = -Σ_o q(o) log p(o)

    Args:
        logits: Float [n, k].
        target: Float [n, k], rows that sum to one.

    Example:
        >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
        >>> round(soft_cross_entropy(logits, torch.tensor([[0.0, 0.5, 0.5]])).item(), 4)
        1.3863
    """
    return -(target * torch.log_softmax(logits, dim=1)).sum(dim=1)
