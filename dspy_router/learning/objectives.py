"""Losses of a policy given by logits, one value a row; smaller is better.

Shapes: `logits` float [n, k]; results float [n]. All are differentiable in the logits.
"""

import torch
from torch import Tensor


def set_likelihood(logits: Tensor, possible: Tensor) -> Tensor:
    """Minus the log-likelihood that the right option is one of those still possible.

        loss = -log Σ_{o possible} p(o),    p = softmax(logits)

    One possible option makes it cross-entropy with a gold label. After tries that earned nothing, what
    is possible is everything not yet tried: the likelihood of 0/1 partial feedback. (Learning from candidate
    labels: Jin and Ghahramani, "Learning with Multiple Labels", 2002.)

    Args:
        logits: Float [n, k].
        possible: Bool [n, k], at least one True a row.

    Raises:
        ValueError: If a row rules out every option.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> possible = torch.tensor([[True, False, False, False], [True, True, False, False]])
        >>> set_likelihood(logits, possible).exp().round(decimals=4).tolist()
        [4.0, 2.0]
    """
    if not bool(possible.any(dim=1).all()):
        raise ValueError("possible rules out every option in a row; leave such rows out.")
    inside = logits.masked_fill(~possible, float("-inf")).logsumexp(dim=1)
    return logits.logsumexp(dim=1) - inside


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
