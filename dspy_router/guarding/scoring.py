"""How far a route's decisions can be relied on: the score that a guard holds against its threshold."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dspy_router.folded_lists import FoldedListHead
from dspy_router.learning.familiarity import decision_score

if TYPE_CHECKING:
    from dspy_router.route import DifferentiableRoute


def route_scores(
    route: "DifferentiableRoute", vectors: np.ndarray, candidates: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Scores, float64 [n], of the decisions for vectors [n, d]; of several fields the least counts.

    A trained route's is `dspy_router.learning.familiarity.decision_score`; an untrained one has nothing to go by but
    how near its options' descriptions are, all together: the log of the sum of the exponentials of its logits. That of
    a list is the log of its probability, the options taken as independent: an empty list can be as sure as another.

    Args:
        route: Decides.
        vectors: Float32 unit vectors.
        candidates: By field, bool [k]: the options that count. Fields that are not in it have them all.
    """
    candidates = candidates or {}
    references: Mapping[str, Any] = {} if route.learned.record is None else route.learned.record.references
    scores = []
    for field in route.fields:
        head, mask = route.learned.folded(field.name), candidates.get(field.name)
        reference = references.get(field.name)
        if isinstance(head, FoldedListHead):
            scores.append(head.certainty(vectors, mask))
        elif reference is None:
            logits = head.logits(vectors)
            scores.append(np.logaddexp.reduce(logits if mask is None else logits[:, mask], axis=1, dtype=np.float64))
        else:
            scores.append(decision_score(reference, head.logits(vectors), vectors, mask))
    least: np.ndarray = np.min(scores, axis=0)
    return least
