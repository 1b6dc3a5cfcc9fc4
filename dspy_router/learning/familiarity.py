"""How familiar an input is: out-of-scope detection from what a head was trained on, without out-of-scope rows.

Three scores look at an input x, each standardised by its mean and deviation on in-scope rows it has not seen (z below):

    maximum logit     max_o logits(x)[o]                      (Hendrycks et al. 2022, "Scaling Out-of-Distribution ...")
    neighbours        mean cosine to the 3 nearest of the training texts kept   (after Sun et al. 2022, "... Deep
                      Nearest Neighbors")
    Mahalanobis       minus the relative Mahalanobis distance, as in `dspy_router.learning.mahalanobis`

    familiarity = (z(maximum logit) + ½ z(neighbours) + z(Mahalanobis)) / 2.5
    decision score = familiarity + ¾ z(log-odds of the likeliest option)

An option without training rows, say one added later, is judged by its description: familiarity is the largest of the
above and of z(cosine to the description), standardised on how near the held-out rows are to the descriptions of their
own options.

The weights, the number of neighbours and of the texts kept were chosen on CLINC150's validation rows against its 100
out-of-scope validation requests, and on CLINC150 and BANKING77 with a fifth of the intents held out as out of scope.

What is kept, and so saved with a route, is the `Reference`; its size is bounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dspy_router.learning.mahalanobis import RelativeMahalanobis
from dspy_router.learning.reference import KEPT, KEPT_AN_OPTION, SCORES, TEXT_LENGTH, Reference
from dspy_router.learning.rows import REWARD_SCALE, Objective, TargetRows

FEWEST_ROWS = 10  # fewer say too little of what is familiar
FOLDS = 5
LOGIT_WEIGHT, NEIGHBOURS_WEIGHT, MAHALANOBIS_WEIGHT = 1.0, 0.5, 1.0
ODDS_WEIGHT = 0.75


def familiarity(
    reference: Reference, logits: np.ndarray, vectors: np.ndarray, candidates: np.ndarray | None = None
) -> np.ndarray:
    """How much inputs are like what the options were trained on.

    Args:
        reference: Of the field.
        logits: Float [n, k], the head's.
        vectors: Float32 [n, d], the inputs' unit vectors.
        candidates: Bool [k]; the options that count, by default all.

    Returns:
        Float64 [n]: about 0 for a typical in-scope input, with a deviation a little below 1; the lower, the less
        familiar. The scale is the reference's own: choose a threshold on held-out rows.

    Raises:
        ValueError: If the shapes do not fit, or no option is a candidate.

    Example:
        >>> random = np.random.default_rng(0)
        >>> labels = np.arange(100) % 2
        >>> vectors = np.eye(2, 8, dtype=np.float32)[labels] + 0.1 * random.standard_normal((100, 8), np.float32)
        >>> rows, head = TargetRows.from_labels(labels, 2), np.eye(8, 2)
        >>> descriptions = np.eye(2, 8)
        >>> reference = build_reference(["fig", "date"], descriptions, vectors, rows, vectors @ head, ["-"] * 100)
        >>> strange = np.eye(8, dtype=np.float32)[[1, 5]]
        >>> (familiarity(reference, strange @ head, strange) > -2).tolist()
        [True, False]
    """
    return _combined(reference.scores(logits, vectors, candidates))


def decision_score(
    reference: Reference, logits: np.ndarray, vectors: np.ndarray, candidates: np.ndarray | None = None
) -> np.ndarray:
    """How much the likeliest option can be relied on: familiarity, and the log-odds of that option.

    Familiarity tells inputs apart that no option fits; the odds, those between two options. Log-odds tell a probability
    of 0.99 from one of 0.9999, as the probability and its logarithm hardly do. Arguments, shape and errors are those
    of `familiarity`.
    """
    scores = reference.scores(logits, vectors, candidates)
    return _combined(scores) + ODDS_WEIGHT * scores["odds"]


def build_reference(
    options: Sequence[str],
    option_vectors: np.ndarray,
    vectors: np.ndarray,
    rows: TargetRows,
    logits: np.ndarray,
    texts: Sequence[str],
    *,
    held_out: np.ndarray | None = None,
    seed: int = 0,
) -> Reference | None:
    """Describe what the options of a field look like.

    An input belongs to the option that is likeliest by the head and by what its row says. So a gold label is taken
    as it is, and where only failures are known, the head decides among the options left.

    Args:
        options: The k options' names, in the order of the logits.
        option_vectors: Float [k, d], their descriptions' unit vectors.
        vectors: Float32 [n, d], the training inputs' unit vectors.
        rows: What is known of them.
        logits: Float [n, k], the head's; in the held-out rows preferably of a head that was fitted without them.
        texts: The n inputs.
        held_out: Bool [n]: rows that standardise the scores, which are computed from the others. Without it, rows
            are left out a fifth at a time.
        seed: Of the draw of the texts kept.

    Returns:
        None with fewer than `FEWEST_ROWS` rows.

    Raises:
        ValueError: If the shapes do not fit.
    """
    count, given = len(options), (len(vectors), len(rows), len(texts))
    if len(set(given)) > 1 or rows.target.shape != logits.shape or logits.shape[1] != count:
        raise ValueError(
            f"{given} vectors, rows and texts, targets {rows.target.shape} and logits {logits.shape}, {count} options."
        )
    if len(rows) < FEWEST_ROWS:
        return None
    if held_out is not None and (held_out.shape != (len(rows),) or not 0 < held_out.sum() < len(rows)):
        raise ValueError(
            f"held_out has shape {held_out.shape} and {held_out.sum()} True: expected some of {len(rows)}."
        )
    labels = _likeliest(rows, logits)
    build = _Builder(tuple(options), option_vectors, vectors, labels, texts, seed)
    folds = [np.flatnonzero(held_out)] if held_out is not None else _folds(len(rows), seed)
    raw: dict[str, list[np.ndarray]] = {}
    for left in folds:
        rest = np.setdiff1d(np.arange(len(rows)), left)
        seen = left[np.isin(labels[left], labels[rest])]
        left = seen if len(seen) > 1 else left  # an option's only row cannot tell what its others would be like
        unit = dict.fromkeys(SCORES, (0.0, 1.0))
        scores = build.reference(rest, unit).scores(logits[left], vectors[left])
        scores["description"] = (vectors[left] * option_vectors[labels[left]]).sum(axis=1)
        for name, score in scores.items():
            raw.setdefault(name, []).append(score)
    moments = {name: _moments(np.concatenate(parts)) for name, parts in raw.items()}
    return build.reference(np.arange(len(rows)), moments)


@dataclass(frozen=True)
class _Builder:
    options: tuple[str, ...]
    option_vectors: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray
    texts: Sequence[str]
    seed: int

    def reference(self, rows: np.ndarray, moments: Mapping[str, tuple[float, float]]) -> Reference:
        """The reference of some of the rows."""
        vectors, labels = self.vectors[rows], self.labels[rows]
        trained, index = np.unique(labels, return_inverse=True)
        kept = _sample(labels, self.seed)
        others = np.setdiff1d(np.arange(len(self.options)), trained)
        return Reference(
            options=self.options,
            trained=trained,
            mahalanobis=RelativeMahalanobis.of(vectors, index, len(trained)),
            texts=tuple(self.texts[row][:TEXT_LENGTH] for row in rows[kept]),
            text_options=labels[kept],
            text_vectors=vectors[kept].astype(np.float16),
            descriptions=self.option_vectors[others].astype(np.float16),
            moments=moments,
            rows=len(rows),
        )


def _likeliest(rows: TargetRows, logits: np.ndarray) -> np.ndarray:
    """The option [n] with the largest logit plus log-likelihood, or plus reward in units of log-odds."""
    rewarded = rows.objective == Objective.REWARD
    with np.errstate(divide="ignore"):
        known = np.where(rewarded[:, None], REWARD_SCALE * rows.target, np.log(rows.target.clip(0)))
    # A row that rules everything out says nothing.
    known[~np.isfinite(known.max(axis=1))] = 0.0
    return (logits + known).argmax(axis=1)


def _sample(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows drawn for keeping, sorted: equally many of each option, within the bounds but at least one."""
    order = np.random.default_rng(seed).permutation(len(labels))
    quota = min(KEPT_AN_OPTION, max(1, KEPT // len(np.unique(labels))))
    kept = [order[labels[order] == option][:quota] for option in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def _folds(rows: int, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import KFold  # needed here alone, and heavy: a route that only decides does without

    return [left for _, left in KFold(FOLDS, shuffle=True, random_state=seed).split(np.zeros(rows))]


def _moments(score: np.ndarray) -> tuple[float, float]:
    deviation = float(score.std(dtype=np.float64))
    return float(score.mean(dtype=np.float64)), deviation if deviation > 1e-9 else 1.0


def _combined(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    if "neighbours" not in scores:
        return np.asarray(scores["description"], np.float64)
    total = LOGIT_WEIGHT * scores["logit"] + NEIGHBOURS_WEIGHT * scores["neighbours"]
    total = total + MAHALANOBIS_WEIGHT * scores["mahalanobis"]
    total = total / (LOGIT_WEIGHT + NEIGHBOURS_WEIGHT + MAHALANOBIS_WEIGHT)
    if "description" in scores:
        total = np.maximum(total, scores["description"])
    return np.asarray(total, np.float64)
