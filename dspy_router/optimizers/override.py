"""Making the decisions of one run from outside: some forced, the others drawn at random or left to the policy."""

import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspy_router.decisions import Decision
from dspy_router.overrides import draw


@dataclass(frozen=True, order=True)
class Site:
    """Where in a run a decision is made: the route's name in the program, the field, and which call it is."""

    route: str
    field: str
    occurrence: int


@dataclass(frozen=True)
class SiteDecision:
    """A decision made in a rollout: the site, what was read, what was chosen and how, among which candidates.

    Logs of earlier releases hold no candidates: there are none in what was read from them.
    """

    site: Site
    text: str
    chosen: str
    propensity: float
    candidates: tuple[str, ...] = ()


def route_names(routes: Mapping[str, Any]) -> dict[int | str, str]:
    """Route names by identity, and by origin for the copies that modules such as `dspy.BestOfN` make when they run."""
    origins = Counter(route.learned.origin for route in routes.values())
    copies = {route.learned.origin: name for name, route in routes.items() if origins[route.learned.origin] == 1}
    return copies | {id(route): name for name, route in routes.items()}


class RunOverride:
    """Chooser and recorder of one run, for `choosing` and `recording`.

    A call of a route gets its number in the run when its decision is chosen, and keeps it when the decision is
    recorded: the two follow each other on one thread. Routes called side by side in threads or tasks are numbered in
    the order in which they come, so which of them a forced decision meets is the program's doing.

    Args:
        names: Route names, as `route_names` gives them; other routes are left alone.
        forced: The options to take, by site.
        draws: Draws the decisions that are not forced; None leaves the likeliest.
    """

    def __init__(
        self,
        names: Mapping[int | str, str],
        forced: Sequence[tuple[Site, str]] = (),
        draws: random.Random | None = None,
    ) -> None:
        self.decisions: list[SiteDecision] = []
        self._names = names
        self._forced = dict(forced)
        self._draws = draws
        self._calls: Counter[tuple[str, str]] = Counter()
        self._current = threading.local()
        self._lock = threading.Lock()

    def choose(
        self, route: Any, field: str, probabilities: Mapping[str, float], selected: str
    ) -> tuple[int, float] | None:
        """The option's index and propensity; None leaves the one selected."""
        name = self._name(route)
        if name is None:
            return None
        with self._lock:
            site = self._current.site = self._next_site(name, field)
            options = list(probabilities)
            if (option := self._forced.get(site)) in options:  # unless the predictor in front rules it out
                return options.index(option), 1.0
            if self._draws is None:
                return None
            return draw(list(probabilities.values()), self._draws)

    def record(self, route: Any, decision: Decision) -> None:
        """Keep a decision with the site it was chosen at."""
        name = self._name(route)
        if name is None:
            return
        with self._lock:
            # Not chosen here if the program has an override of its own, which as the innermost decides.
            site = getattr(self._current, "site", None) or self._next_site(name, decision.field)
            self._current.site = None
            candidates = tuple(decision.probabilities)
            self.decisions.append(SiteDecision(site, decision.text, decision.name, decision.propensity, candidates))

    def _name(self, route: Any) -> str | None:
        return self._names.get(id(route)) or self._names.get(route.learned.origin)

    def _next_site(self, name: str, field: str) -> Site:
        site = Site(name, field, self._calls[name, field])
        self._calls[name, field] += 1
        return site
