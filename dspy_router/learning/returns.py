"""What the choices along the paths of graded runs return.

The runs of an example form a tree (`dspy_router.learning.evidence`). A run's reward alone does not say which of its
decisions earned it: one that was right is blamed for a mistake that came after, and of an example run once, no decision
can be told from how hard the example is. So a choice is compared with others made at the same point, by its return,

    Q(d, o) = mean over the runs through it of their reward, or of V(d') where another decision d' follows
    V(d) = Σ_o p(o) Q(d, o) / Σ_o p(o)    over the options tried at d,

from the leaves up: what follows is weighed as the policy p decides it, and not as the runs happened to explore it (tree
backup; Precup, Sutton and Singh, "Eligibility Traces for Off-Policy Policy Evaluation", 2000). How likely the policy is
to come to a decision at all is its reach, the product of p along the path.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dspy_router.learning.evidence import Choice, Field, RunEvidence

SMALLEST_PROBABILITY = 1e-9  # so that of options which the policy has ruled out, the mean counts


@dataclass(frozen=True)
class Returns:
    """What is known of the n decisions of one field.

    Attributes:
        mean: Float [n, k], Q; NaN where never tried.
        looks: Int [n, k], runs through each choice.
        reach: Float [n], in [0, 1].
    """

    mean: np.ndarray
    looks: np.ndarray
    reach: np.ndarray


def tree_returns(
    evidence: RunEvidence[Field], ends: Iterable[tuple[Choice, float]], policies: Mapping[Field, np.ndarray]
) -> dict[Field, Returns]:
    """The returns of all choices that runs went through.

    Args:
        evidence: The decisions of the runs.
        ends: The last choice of every run, and the run's reward.
        policies: The policy's probabilities at each field's decisions, float [n, k].

    Example:
        >>> evidence = RunEvidence({"tool": 2})
        >>> first = evidence.decision("example 1", "tool", "how far?")
        >>> then = evidence.decision("example 1", "tool", "how far? a map", Choice("tool", first, 0))
        >>> ends = [(Choice("tool", first, 1), 0.5), (Choice("tool", then, 0), 0.0), (Choice("tool", then, 1), 1.0)]
        >>> found = tree_returns(evidence, ends, {"tool": np.array([[0.5, 0.5], [0.1, 0.9]])})["tool"]
        >>> found.mean.tolist(), found.looks.tolist(), found.reach.tolist()
        ([[0.9, 0.5], [0.0, 1.0]], [[2, 1], [1, 1]], [1.0, 0.5])
    """
    total = {field: np.zeros(policy.shape) for field, policy in policies.items()}
    looks = {field: np.zeros(policy.shape, np.int32) for field, policy in policies.items()}
    reach = {field: np.ones(len(policy)) for field, policy in policies.items()}
    for end, reward in ends:
        total[end.field][end.row, end.option] += reward
        looks[end.field][end.row, end.option] += 1
    levels = evidence.levels()
    for _, field, rows, parents in reversed(levels):
        tried = looks[field][rows]
        weight = (tried > 0) * np.maximum(policies[field][rows], SMALLEST_PROBABILITY)
        value = (weight * total[field][rows] / np.maximum(tried, 1)).sum(axis=1) / weight.sum(axis=1)
        for parent, runs, mean in zip(parents, tried.sum(axis=1).tolist(), value.tolist(), strict=True):
            total[parent.field][parent.row, parent.option] += runs * mean
            looks[parent.field][parent.row, parent.option] += runs
    for _, field, rows, parents in levels:
        reach[field][rows] = [reach[p.field][p.row] * policies[p.field][p.row, p.option] for p in parents]
    found = {}
    for field, count in looks.items():
        mean = np.where(count > 0, total[field] / np.maximum(count, 1), np.nan)
        found[field] = Returns(mean, count, reach[field])
    return found
