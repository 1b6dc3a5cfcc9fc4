"""What is kept of the training rows of a field, and the scores that hold an input against it.

Its size is bounded: at most `KEPT` texts (one an option where there are more options), their vectors in half precision,
one d × d matrix and one vector an option. With vectors of dimension 384 that is 3.1 MB for 150 options with 20 texts
each, and 1.1 MB for 7 options with 100 texts each. The texts are training texts, cut after `TEXT_LENGTH` characters:
whoever gets a saved route can read them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dspy_router.learning.mahalanobis import RelativeMahalanobis

KEPT = 3000  # training texts kept in all
KEPT_AN_OPTION = 100
TEXT_LENGTH = 500
NEIGHBOURS = 3
SCORES = ("logit", "neighbours", "mahalanobis", "odds", "description")
SMALLEST_ODDS = 1e-9  # against the likeliest option, so that a lone candidate's log-odds are finite
PART = 4096  # inputs whose cosines to all texts are in memory at once


@dataclass(frozen=True, eq=False)
class Reference:
    """What the options of one field look like, as far as training has shown it. Never changed, so copies share it.

    Attributes:
        options: The k options' names, in the order of the head's logits.
        trained: Int [t], the options that had training rows.
        mahalanobis: Their relative Mahalanobis distance.
        texts: The m training texts kept.
        text_options: Int [m], the option of each.
        text_vectors: Float16 [m, d], the vector of each.
        descriptions: Float16 [k - t, d], the description vectors of the other options, in order.
        moments: Mean and standard deviation of every score on in-scope rows.
        rows: Training rows it was made from.
    """

    options: tuple[str, ...]
    trained: np.ndarray
    mahalanobis: RelativeMahalanobis
    texts: tuple[str, ...]
    text_options: np.ndarray
    text_vectors: np.ndarray
    descriptions: np.ndarray
    moments: Mapping[str, tuple[float, float]]
    rows: int

    @cached_property
    def untrained(self) -> np.ndarray:
        """Int [k - t], the options judged by their descriptions."""
        return np.setdiff1d(np.arange(len(self.options)), self.trained)

    def scores(
        self, logits: np.ndarray, vectors: np.ndarray, candidates: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every standardised score [n] by name, for logits [n, k] and vectors [n, d].

        Raises:
            ValueError: If the shapes do not fit, or no option is a candidate.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.options) or logits.shape[:1] != vectors.shape[:1]:
            raise ValueError(
                f"Logits {logits.shape} and vectors {vectors.shape}: expected [n, {len(self.options)}] and [n, d]."
            )
        texts: np.ndarray | slice = slice(None)
        trained: np.ndarray | slice = slice(None)
        described: np.ndarray | slice = slice(None)
        if candidates is not None:
            if candidates.shape != (len(self.options),) or not candidates.any():
                raise ValueError(f"Candidates {candidates.shape}: expected bool [{len(self.options)}], not all False.")
            logits = logits[:, candidates]
            texts, trained, described = (candidates[of] for of in (self.text_options, self.trained, self.untrained))
        largest = logits.max(axis=1)
        against = np.exp(logits - largest[:, None], dtype=np.float64).sum(axis=1) - 1
        found = {"logit": largest, "odds": -np.log(np.maximum(against, SMALLEST_ODDS))}
        if len(self.trained[trained]):
            found["neighbours"] = _nearest(vectors, self._texts[texts])
            found["mahalanobis"] = -self.mahalanobis.distance(vectors, trained)
        if len(self.untrained[described]):
            found["description"] = (vectors @ self._descriptions[described].T).max(axis=1)
        return {name: (value - self.moments[name][0]) / self.moments[name][1] for name, value in found.items()}

    def with_options(self, options: Sequence[str], vectors: np.ndarray) -> "Reference":
        """The reference with further options, known by their description vectors [j, d], behind the others.

        Raises:
            ValueError: If an option is there already, or the vectors are not one an option.
        """
        both = sorted(set(options) & set(self.options))
        if both or len(set(options)) != len(options) or vectors.shape != (len(options), len(self.mahalanobis.center)):
            raise ValueError(f"Options {list(options)} with vectors {vectors.shape}; already there: {both}.")
        descriptions = np.concatenate([self.descriptions, vectors.astype(np.float16)])
        return replace(self, options=(*self.options, *options), descriptions=descriptions)

    def without_options(self, options: Iterable[str]) -> "Reference | None":
        """The reference without some options; what was like them alone is then unfamiliar.

        None if no option with training rows is left.

        Raises:
            ValueError: If an option is not there.
        """
        gone = set(options)
        if unknown := sorted(gone - set(self.options)):
            raise ValueError(f"Options {unknown} are not among {list(self.options)}.")
        stays = np.array([name not in gone for name in self.options])
        if not stays[self.trained].any():
            return None
        place = np.cumsum(stays) - 1
        texts, trained = stays[self.text_options], stays[self.trained]
        return replace(
            self,
            options=tuple(name for name in self.options if name not in gone),
            trained=place[self.trained[trained]],
            mahalanobis=replace(
                self.mahalanobis, linear=self.mahalanobis.linear[trained], constant=self.mahalanobis.constant[trained]
            ),
            texts=tuple(text for text, kept in zip(self.texts, texts, strict=True) if kept),
            text_options=place[self.text_options[texts]],
            text_vectors=self.text_vectors[texts],
            descriptions=self.descriptions[stays[self.untrained]],
        )

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The reference as named float tensors and a JSON object; `from_state` gives the same scores again."""
        tensors = {
            "text_vectors": self.text_vectors,
            "descriptions": self.descriptions,
            "center": self.mahalanobis.center,
            "quadratic": self.mahalanobis.quadratic,
            "linear": self.mahalanobis.linear,
            "constant": self.mahalanobis.constant,
        }
        return tensors, {
            "options": list(self.options),
            "trained": self.trained.tolist(),
            "texts": list(self.texts),
            "text_options": self.text_options.tolist(),
            "moments": {name: list(pair) for name, pair in self.moments.items()},
            "rows": self.rows,
        }

    @staticmethod
    def expected_tensors(metadata: Any, dimension: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor of a state, by name, to be held against what a file claims.

        Raises:
            ValueError: If the metadata, which may come from anywhere, is not what `to_state` gives.
        """
        _require_sound(metadata)
        options, trained, texts = (len(metadata[name]) for name in ("options", "trained", "texts"))
        return {
            "text_vectors": ("float16", (texts, dimension)),
            "descriptions": ("float16", (options - trained, dimension)),
            "center": ("float32", (dimension,)),
            "quadratic": ("float32", (dimension, dimension)),
            "linear": ("float32", (trained, dimension)),
            "constant": ("float32", (trained,)),
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, np.ndarray], metadata: Any) -> "Reference":
        """The reference of a state.

        Raises:
            ValueError: If tensors or metadata are not such as `to_state` gives.
        """
        center = tensors.get("center")
        expected = cls.expected_tensors(metadata, 0 if center is None else center.size)
        found = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"Tensors {found}; expected {expected}.")
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("A tensor of the reference is not finite.")
        return cls(
            options=tuple(metadata["options"]),
            trained=np.array(metadata["trained"], np.int64),
            mahalanobis=RelativeMahalanobis(*(tensors[name] for name in ("center", "quadratic", "linear", "constant"))),
            texts=tuple(metadata["texts"]),
            text_options=np.array(metadata["text_options"], np.int64),
            text_vectors=tensors["text_vectors"],
            descriptions=tensors["descriptions"],
            moments={name: (float(mean), float(deviation)) for name, (mean, deviation) in metadata["moments"].items()},
            rows=metadata["rows"],
        )

    @cached_property
    def _texts(self) -> np.ndarray:
        return self.text_vectors.astype(np.float32)

    @cached_property
    def _descriptions(self) -> np.ndarray:
        return self.descriptions.astype(np.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reference":
        return self


def _nearest(vectors: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Mean cosine [n] of vectors [n, d] to the nearest of the texts [m, d]."""
    nearest = min(NEIGHBOURS, len(texts))
    parts = [vectors[start : start + PART] @ texts.T for start in range(0, max(1, len(vectors)), PART)]
    return np.concatenate([np.partition(part, -nearest, axis=1)[:, -nearest:].mean(axis=1) for part in parts])


def _require_sound(metadata: Any) -> None:
    keys = {"options", "trained", "texts", "text_options", "moments", "rows"}
    if not isinstance(metadata, dict) or set(metadata) != keys:
        raise ValueError(f"The metadata of a reference must have the keys {sorted(keys)}.")
    options, trained, texts, text_options, moments, rows = (
        metadata[name] for name in ("options", "trained", "texts", "text_options", "moments", "rows")
    )
    if not _all(options, str) or not options or len(set(options)) != len(options):
        raise ValueError("The options of a reference must be different names.")
    known = set(range(len(options)))
    if not _all(trained, int) or not trained or trained != sorted(set(trained) & known):
        raise ValueError(f"The trained options of a reference must be some of {len(options)}, in order.")
    if not _all(texts, str) or not 0 < len(texts) <= max(KEPT, len(options)) or max(map(len, texts)) > TEXT_LENGTH:
        raise ValueError(f"A reference keeps 1 to {KEPT} texts of at most {TEXT_LENGTH} characters.")
    if not _all(text_options, int) or len(text_options) != len(texts) or not set(text_options) <= set(trained):
        raise ValueError("Every text of a reference must belong to a trained option.")
    if not isinstance(moments, dict) or set(moments) != set(SCORES):
        raise ValueError(f"A reference must have the moments of {SCORES}.")
    for name, pair in moments.items():
        if not _all(pair, float) or len(pair) != 2 or not all(map(math.isfinite, pair)) or pair[1] <= 0:
            raise ValueError(f"The moments of {name!r} must be a finite mean and a positive deviation, not {pair!r}.")
    if type(rows) is not int or rows < 1:
        raise ValueError(f"A reference is made from at least one row, not {rows!r}.")


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
