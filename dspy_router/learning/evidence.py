"""What the outcomes of runs say about the right decisions.

A run makes one decision or several and earns one 0/1 reward. The decisions of an example's runs form a tree: two
runs that decide alike share a path until they part. One path is taken to be the right one: a run along it succeeds,
any other fails, except that a reward is wrong with probability ε, the noise. If t is the right path, the outcomes
of all runs of the example have the likelihood

    L(t) ∝ ((1 - ε) / ε) ^ (successes - failures of the runs along t),    L = 1 for a path never run.

With the policy as prior, p(path) = Π p(option at each decision), everything follows by summing over the tree, from
the leaves up: the likelihood of an option at a decision is that of its outcomes times Σ_o p(o) L(o) of the decision
that follows. With one decision a run and ε = 0 this is exact partial feedback: a success settles the decision, a
failure rules its option out. The chance that the right path comes by a decision at all is its reach.

That an example has a right path is an assumption, which a request that no option serves and a metric that cannot be
pleased both break. With probability ρ none is right and every run fails, which has the likelihood of a path never run:

    L'(t) = (1 - ρ) L(t) + ρ,    for an example's first decision, since Σ_t p(t) = 1

So a failed option keeps a likelihood of ρ, what the failures of all others say of the last one left is bounded, and an
example on which everything failed says nothing. How often that happens is learned from all examples: ρ maximises

    Σ_examples log((1 - ρ) Z + ρ) + log ρ + log(1 - ρ),    Z = mean of L over all that could be chosen

The last two terms are a Beta(2, 2) prior, worth one example with a right path and one without. n examples with a
success and m on which all options failed give (1 + m) / (2 + n + m); one that is between the two hardly moves it. Z
leaves out what the policy thinks: fitted to the same outcomes, it is sure of whatever they have not yet ruled out.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

Field = TypeVar("Field", bound=Hashable)
# No reward is trusted beyond this, so that outcomes that contradict each other leave something possible.
SMALLEST_NOISE = 1e-9
SMALLEST_NONE_RIGHT = 1e-12


class Choice(NamedTuple):
    """An option taken at a decision: the decision's field, its row among the field's, and the option's index."""

    field: Any
    row: int
    option: int


class Decided(NamedTuple):
    """A decision of one example: what was read, and the choice that led here (None at a run's first decision)."""

    example: Hashable
    text: str
    parent: Choice | None
    depth: int


@dataclass(frozen=True)
class Posterior:
    """What is known of the n decisions of one field.

    Attributes:
        likelihood: Float32 [n, k], the likelihood of all outcomes for each option, 1 for the likeliest. At an
            example's first decision that none is right is allowed for; at later ones, it is part of the reach.
        probability: Float32 [n, k], the policy's, made up with the outcomes, if one is right; rows sum to one.
        reach: Float32 [n], the chance that there is a right path and that it comes by.
    """

    likelihood: np.ndarray
    probability: np.ndarray
    reach: np.ndarray


class RunEvidence(Generic[Field]):
    """Outcomes of runs, by example and path; see the module's text.

    Args:
        options: Number of options of each decided field.

    Example:
        >>> evidence = RunEvidence({"tool": 3})
        >>> evidence.observe("example 1", [("tool", "how far?", 2)], success=False)
        >>> posterior = evidence.posterior({"tool": np.array([[0.2, 0.2, 0.6]])})["tool"]
        >>> posterior.probability.round(2).tolist()
        [[0.5, 0.5, 0.0]]
    """

    def __init__(self, options: Mapping[Field, int]) -> None:
        self.options = dict(options)
        self.decisions: dict[Field, list[Decided]] = {field: [] for field in options}
        self._rows: dict[tuple[Hashable, Choice | None, Field, str], int] = {}
        self._outcomes: dict[Field, list[tuple[int, int, bool]]] = {field: [] for field in options}

    def decision(self, example: Hashable, field: Field, text: str, parent: Choice | None = None) -> int:
        """The row of a decision among its field's, added if it is new."""
        key = (example, parent, field, text)
        row = self._rows.get(key)
        if row is None:
            depth = 0 if parent is None else self.decisions[parent.field][parent.row].depth + 1
            row = self._rows[key] = len(self.decisions[field])
            self.decisions[field].append(Decided(example, text, parent, depth))
        return row

    def observe(self, example: Hashable, path: Sequence[tuple[Field, str, int]], *, success: bool) -> None:
        """Take note of a run: its decisions in order as (field, text read, option's index), and its outcome."""
        parent: Choice | None = None
        for field, text, option in path:
            parent = Choice(field, self.decision(example, field, text, parent), option)
        if parent is not None:
            self._outcomes[path[-1][0]].append((parent.row, parent.option, success))

    def path(self, choice: Choice) -> list[Choice]:
        """The choices of a run from its first decision to this choice."""
        found: list[Choice] = []
        step: Choice | None = choice
        while step is not None:
            found.append(step)
            step = self.decisions[step.field][step.row].parent
        return found[::-1]

    def texts(self, field: Field) -> list[str]:
        """What was read at each decision of a field, in the order of the rows."""
        return [decided.text for decided in self.decisions[field]]

    def outcomes(self, field: Field) -> tuple[np.ndarray, np.ndarray]:
        """Successes and failures of the runs that ended with each choice: int32 [n, k] each."""
        shape = (len(self.decisions[field]), self.options[field])
        counts = np.zeros((2, *shape), np.int32)
        if outcomes := self._outcomes[field]:
            rows, options, success = (np.array(column) for column in zip(*outcomes, strict=True))
            np.add.at(counts, (1 - success.astype(int), rows, options), 1)
        return counts[0], counts[1]

    def continued(self, field: Field) -> np.ndarray:
        """Bool [n, k]: choices after which a run was seen to decide further."""
        found = np.zeros((len(self.decisions[field]), self.options[field]), bool)
        for decisions in self.decisions.values():
            for decided in decisions:
                if decided.parent is not None and decided.parent.field == field:
                    found[decided.parent.row, decided.parent.option] = True
        return found

    def none_right(self, open_: Mapping[Field, np.ndarray], noise: float = 0.0) -> float:
        """The probability ρ that an example has no right path; 1/2 before any outcome.

        Args:
            open_: What could be chosen at each field's decisions: bool [n, k].
            noise: Share of rewards that are wrong, in [0, 0.5).

        Example:
            >>> evidence = RunEvidence({"tool": 2})
            >>> for example in range(6):
            ...     evidence.observe(example, [("tool", "how far?", 0)], success=example > 0)
            >>> evidence.observe(0, [("tool", "how far?", 1)], success=False)
            >>> round(evidence.none_right({"tool": np.ones((6, 2), bool)}), 3)  # (1 + 1) / (2 + 5 + 1)
            0.25
        """
        even = {field: mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) for field, mask in open_.items()}
        evidence = self._evidence(even, noise)
        logs = [_log_mean(even[field], entries)[self._first(field)] for field, entries in evidence.items()]
        # Of an overwhelming success, the size does not matter.
        mean = np.exp(np.minimum(np.concatenate([np.zeros(0), *logs]), 100.0))

        def slope(none: float) -> float:
            return float(((1 - mean) / ((1 - none) * mean + none)).sum() + 1 / none - 1 / (1 - none))

        return float(brentq(slope, SMALLEST_NONE_RIGHT, 1 - SMALLEST_NONE_RIGHT, xtol=SMALLEST_NONE_RIGHT))

    def posterior(
        self, policies: Mapping[Field, np.ndarray], noise: float = 0.0, none_right: float = 0.0
    ) -> dict[Field, Posterior]:
        """What the outcomes and the policy together say of every decision.

        Args:
            policies: The policy's probabilities at each field's decisions, float [n, k].
            noise: Share of rewards that are wrong, in [0, 0.5).
            none_right: The probability ρ that an example has no right path, in [0, 1).
        """
        none_right = max(none_right, SMALLEST_NONE_RIGHT)
        evidence = self._evidence(policies, noise)
        found = {}
        for field, entries in evidence.items():
            first = self._first(field)
            some = logit(1 - none_right) + _log_mean(policies[field], entries)
            reach = np.where(first, expit(some), 1.0).astype(np.float32)
            allowed = np.logaddexp(entries + np.log1p(-none_right), np.log(none_right))
            likelihood = _relative(np.where(first[:, None], allowed, entries))
            probability = np.maximum(policies[field].astype(np.float32), 1e-30) * _relative(entries)
            probability /= probability.sum(axis=1, keepdims=True)
            found[field] = Posterior(likelihood, probability, reach)
        for _, field, rows, parents in self.levels():
            found[field].reach[rows] = [
                found[p.field].reach[p.row] * found[p.field].probability[p.row, p.option] for p in parents
            ]
        return found

    def _evidence(self, policies: Mapping[Field, np.ndarray], noise: float) -> dict[Field, np.ndarray]:
        """Log L of every option, float32 [n, k], with what followed it summed over the policy."""
        noise = max(noise, SMALLEST_NOISE)
        step = float(np.log((1 - noise) / noise))
        evidence: dict[Field, np.ndarray] = {}
        for field in self.options:
            successes, failures = self.outcomes(field)
            evidence[field] = (step * (successes - failures)).astype(np.float32)
        for _, field, rows, parents in reversed(self.levels()):
            value = _log_mean(policies[field][rows], evidence[field][rows])
            for parent, entry in zip(parents, value.tolist(), strict=True):
                evidence[parent.field][parent.row, parent.option] += entry
        return evidence

    def _first(self, field: Field) -> np.ndarray:
        """Bool [n]: decisions that no other comes before."""
        return np.array([decided.parent is None for decided in self.decisions[field]], bool)

    def levels(self) -> list[tuple[int, Field, np.ndarray, list[Choice]]]:
        """The decisions that follow another, by depth and field, with the choices that led to them."""
        grouped: dict[tuple[int, Field], list[tuple[int, Choice]]] = defaultdict(list)
        for field, decisions in self.decisions.items():
            for row, decided in enumerate(decisions):
                if decided.parent is not None:
                    grouped[decided.depth, field].append((row, decided.parent))
        return [
            (depth, field, np.array([row for row, _ in entries]), [parent for _, parent in entries])
            for (depth, field), entries in sorted(grouped.items(), key=lambda item: item[0][0])
        ]


def _relative(evidence: np.ndarray) -> np.ndarray:
    """Likelihoods by their logarithms, float32 [n, k], the largest of a row 1."""
    return np.asarray(np.exp(evidence - evidence.max(axis=1, keepdims=True, initial=-np.inf)), np.float32)


def _log_mean(policy: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Log Σ_o p(o) exp(evidence(o)), row by row."""
    highest = evidence.max(axis=1, keepdims=True, initial=-np.inf)
    return np.log((policy * np.exp(evidence - highest)).sum(axis=1) + 1e-30) + highest[:, 0]
