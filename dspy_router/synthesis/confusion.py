"""Which options a policy takes for one another."""

from collections.abc import Sequence

import numpy as np


def confusion(probabilities: np.ndarray, right: Sequence[int]) -> np.ndarray:
    """Mean probability that texts of one option give to each other option.

        C[a, b] = mean over texts i with right[i] = a of p(b | text i),  and C[a, a] = 0

    Args:
        probabilities: The policy [n, k] on n texts.
        right: The option each text belongs to, n indices in [0, k); every option has at least one text.

    Returns:
        Float array [k, k] in [0, 1]; row a tells what a's texts are taken for.

    Example:
        >>> confusion(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]), [0, 0, 1])
        array([[0. , 0.3],
               [0.2, 0. ]])
    """
    owners = np.eye(probabilities.shape[1])[list(right)]
    means = (owners.T @ probabilities) / owners.sum(axis=0)[:, None]
    np.fill_diagonal(means, 0.0)
    return means


def rivals(confused: np.ndarray, most: int) -> list[list[int]]:
    """The options each option is taken for, likeliest first, at most `most`; ties by declaration order.

    Example:
        >>> rivals(np.array([[0.0, 0.1, 0.3], [0.2, 0.0, 0.2], [0.4, 0.1, 0.0]]), most=2)
        [[2, 1], [0, 2], [0, 1]]
    """
    order = np.argsort(-confused, axis=1, kind="stable").tolist()
    return [[other for other in row if other != option][:most] for option, row in enumerate(order)]
