"""Probabilities of options by name: a dict, or where the options are very many a view of the array."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np

# Up to so many options a dict adds about 1 % to the time of a decision; among 100,000 it would double it.
MANY = 2_000


class Probabilities(Mapping[str, float]):
    """Option name to probability, in declaration order, over an array: no Python object is made for each option.

    A decision among 100,000 options then holds 0.4 MB, where a dict takes ten.

    Args:
        names: The options' names, in declaration order. Kept, not copied, as are the positions.
        positions: From each name to its place among the names.
        values: Float [k]; kept as float32.
        candidates: Bool [k]: the options that the mapping holds, at least one; all by default.

    Example:
        >>> import numpy as np
        >>> names, values = ("fig", "date", "lime"), np.array([0.25, 0.0, 0.75])
        >>> fruit = Probabilities(names, {"fig": 0, "date": 1, "lime": 2}, values, np.array([True, False, True]))
        >>> dict(fruit), fruit.likeliest(1), "date" in fruit
        ({'fig': 0.25, 'lime': 0.75}, {'lime': 0.75}, False)
    """

    __slots__ = ("_candidates", "_names", "_positions", "_values")

    def __init__(
        self,
        names: Sequence[str],
        positions: Mapping[str, int],
        values: "np.ndarray",
        candidates: "np.ndarray | None" = None,
    ) -> None:
        self._names = names
        self._positions = positions
        self._values = values.astype("f4")
        self._candidates = candidates

    def likeliest(self, k: int) -> dict[str, float]:
        """The k likeliest options, at least one, likeliest first; ties in the declared order."""
        values = self._values
        if self._candidates is not None:
            values = values.copy()
            values[~self._candidates] = -1.0
        k = min(k, len(self))
        # All that reach the k-th largest value, so that among equal ones the first declared are taken.
        if k == 1:
            least = values.max()
        else:
            parted = values.copy()
            parted.partition(-k)
            least = parted[-k]
        reach = (values >= least).nonzero()[0]
        order = reach[(-values[reach]).argsort(kind="stable")[:k]]
        return {self._names[place]: float(values[place]) for place in order.tolist()}

    def __getitem__(self, name: str) -> float:
        place = self._positions[name]
        if self._candidates is not None and not self._candidates[place]:
            raise KeyError(name)
        return float(self._values[place])

    def __iter__(self) -> Iterator[str]:
        if self._candidates is None:
            return iter(self._names)
        return (self._names[place] for place in self._candidates.nonzero()[0].tolist())

    def __len__(self) -> int:
        return len(self._values) if self._candidates is None else int(self._candidates.sum())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {value:.4g}" for name, value in self.likeliest(3).items())
        return f"Probabilities({len(self):,} options; likeliest: {{{shown}}})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probabilities":
        return self  # immutable


def by_name(
    names: Sequence[str], positions: Mapping[str, int], values: "np.ndarray", candidates: "np.ndarray | None" = None
) -> Mapping[str, float]:
    """A dict from the candidates' names to their probabilities; `Probabilities` where they are more than `MANY`.

    The arguments are those of `Probabilities`.
    """
    count = len(values) if candidates is None else int(candidates.sum())
    if count > MANY:
        return Probabilities(names, positions, values, candidates)
    if candidates is None:
        return dict(zip(names, values.tolist(), strict=True))
    open_ = candidates.nonzero()[0].tolist()
    return {names[place]: value for place, value in zip(open_, values[open_].tolist(), strict=True)}


def likeliest_option(probabilities: Mapping[str, float]) -> str:
    """The likeliest option; ties go to the one declared first."""
    if isinstance(probabilities, Probabilities):
        return next(iter(probabilities.likeliest(1)))
    return max(probabilities, key=probabilities.__getitem__)


def likeliest(probabilities: Mapping[str, float], k: int) -> dict[str, float]:
    """The k likeliest options, likeliest first; ties in the declared order.

    Raises:
        RouteError: If k is less than one.

    Example:
        >>> likeliest({"fig": 0.25, "date": 0.25, "lime": 0.5}, 2)
        {'lime': 0.5, 'fig': 0.25}
    """
    if k < 1:
        raise RouteError(f"k={k}: give a number of options, at least one.")
    if isinstance(probabilities, Probabilities):
        return probabilities.likeliest(k)
    return dict(sorted(probabilities.items(), key=lambda item: -item[1])[:k])
