"""Making the decisions of routes from outside, for the runs inside a block.

An override is context-local, like the record of decisions: DSPy's worker threads and async tasks started inside the
block inherit it, and it reaches every route of whatever program runs there.
"""

import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dspy_router.decisions import choosing
from dspy_router.errors import RouteError

# Of a drawn decision's probability, the share that goes evenly to all options: none is ever impossible.
EVEN_SHARE = 0.2


def draw(
    probabilities: Sequence[float], generator: random.Random, share: float = 1.0, selected: int = 0
) -> tuple[int, float]:
    """Draw an option near the policy, with its propensity.

        μ(o) = (1 - share) 1[o is selected] + share ((1 - EVEN_SHARE) p(o) + EVEN_SHARE / k)

    Args:
        probabilities: The policy's, summing to one.
        generator: Draws.
        share: Of decisions that are drawn at all, in (0, 1].
        selected: The option taken by all other decisions.

    Returns:
        The option's index, and the probability it had, in (0, 1].

    Example:
        >>> index, propensity = draw([0.9, 0.1], random.Random(0), share=0.5)
        >>> index, round(propensity, 2)
        (0, 0.91)
    """
    even = EVEN_SHARE / len(probabilities)
    chances = [share * ((1 - EVEN_SHARE) * probability + even) for probability in probabilities]
    chances[selected] += 1 - share
    [index] = generator.choices(range(len(chances)), chances)
    return index, min(1.0, chances[index] / sum(chances))


@contextmanager
def explore_decisions(share: float = 0.1, *, seed: int | None = None) -> Iterator[None]:
    """Let some decisions inside the block be drawn at random near the policy, so that logs can judge other policies.

    Every decision carries its propensity. Without exploration a log holds nothing about options the route would not
    have chosen, and `dspy_router.evaluation.compare` refuses a verdict.

    Args:
        share: Of the decisions, how many are drawn; the others are as without exploration. In (0, 1].
        seed: Makes the draws repeatable where decisions are made in the same order.

    Raises:
        RouteError: If `share` is out of range.

    Example:
        >>> import numpy as np
        >>> from dspy_router import DifferentiableRoute
        >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
        >>> with explore_decisions(0.5, seed=0):
        ...     drawn = {route(text="a fig, if I may").fruit for _ in range(100)}
        >>> sorted(drawn)
        ['date', 'fig']
    """
    if not 0 < share <= 1:
        raise RouteError(f"share={share} is no share of decisions to draw: give a number above 0 and up to 1.")
    with choosing(_Drawing(share, random.Random(seed))):
        yield


@contextmanager
def force_decisions(options: Mapping[str, str | Collection[Any]]) -> Iterator[None]:
    """Force what is decided for the named fields inside the block, whatever the policy says.

    Args:
        options: From an output field to the name of the option to take, or for a list to the options in it; other
            fields are left alone.

    Raises:
        RouteError: Inside the block, where a route decides such a field but has no such option.

    Example:
        >>> import numpy as np
        >>> from dspy_router import DifferentiableRoute
        >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
        >>> with force_decisions({"fruit": "date"}):
        ...     prediction = route(text="a fig, if I may")
        >>> prediction.fruit, prediction.confidence < 0.5
        ('date', True)
    """
    with choosing(_Forcing(options)):
        yield


class _Drawing:
    def __init__(self, share: float, generator: random.Random) -> None:
        self._share = share
        self._generator = generator
        self._lock = threading.Lock()

    def choose(
        self, route: Any, field: str, probabilities: Mapping[str, float], selected: str
    ) -> tuple[int, float] | None:
        own = list(probabilities).index(selected)
        with self._lock:
            return draw(list(probabilities.values()), self._generator, self._share, own)


class _Forcing:
    def __init__(self, options: Mapping[str, str | Collection[Any]]) -> None:
        self._options = dict(options)

    def choose(
        self, route: Any, field: str, probabilities: Mapping[str, float], selected: str
    ) -> tuple[int, float] | None:
        option: Any = self._options.get(field)
        if option is None:
            single = next((decided for decided in route.decision_fields if decided.name == field), None)
            if single is None or single.output == field or single.output not in self._options:
                return None
            index = single.index_of(self._options[single.output])
            if index is None:
                raise RouteError(
                    f"force_decisions: {', '.join(single.strays(self._options[single.output]))} in {single.output!r}, "
                    "which takes a list of its options."
                )
            option = single.option_names[index]
        if not isinstance(option, str) or option not in probabilities:
            raise RouteError(
                f"force_decisions: {option!r} is no option of the field {field!r}, or the predictor's weights or "
                f"threshold rule it out; its options are {list(probabilities)}."
            )
        return list(probabilities).index(option), 1.0
