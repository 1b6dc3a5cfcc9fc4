"""Evidence before switching: a candidate held against the log of what decides now.

The estimates are those of `dspy_router.evaluation.offline`. This module finds the rows that speak of the candidate,
decides whether the log can judge it at all, and says the verdict in a sentence.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import compress
from pathlib import Path
from typing import Literal

import dspy
import numpy as np
from tqdm.auto import tqdm

from dspy_router.errors import RouteError
from dspy_router.evaluation.objections import objections
from dspy_router.evaluation.offline import Interval, LoggedRows, OfflineEvaluation, evaluate_policy
from dspy_router.feedback import Feedback, first_of_run, read_feedback
from dspy_router.fields import DecisionField
from dspy_router.learning.reward_model import cross_fitted_rewards
from dspy_router.route import DifferentiableRoute
from dspy_router.tables import table

DECIDED = ("log", "rollout")  # sources of rows that are decisions with what came of them, good or bad


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        field: The output field compared.
        evaluation: The estimates with their intervals, and the overlap of candidate and log.
        changed: Share of the rows in which the candidate decides otherwise than the log did; its expectation if the
            candidate is stochastic.
        set_aside: Logged rows that could not be used, by reason.
        objections: Why there is no verdict; empty if there is one.
        baseline: Whether the difference is to a baseline program, instead of to the log as it was.
    """

    field: str
    evaluation: OfflineEvaluation
    changed: float
    set_aside: Mapping[str, int]
    objections: tuple[str, ...]
    baseline: bool = False

    @property
    def verdict(self) -> Literal["switch", "do not switch", "no verdict"]:
        """`"switch"` if the whole interval of the doubly robust difference lies above 0."""
        if self.objections:
            return "no verdict"
        return "switch" if self.evaluation.estimates["doubly robust"].difference.low > 0 else "do not switch"

    @property
    def sentence(self) -> str:
        """The verdict with its figures."""
        if self.objections:
            return f"No verdict: {'; '.join(self.objections)}."
        found = self.evaluation.estimates["doubly robust"]
        earned, gain = found.reward.value, found.difference
        other = "the baseline would have" if self.baseline else "the log"
        return (
            f"{self.verdict.capitalize()}: {'no difference is shown; ' if gain.low <= 0 <= gain.high else ''}the "
            f"candidate would have earned {earned:.4g} a decision where {other} earned "
            f"{earned - gain.value:.4g}, a "
            f"difference of {gain.value:+.3g} ({self._confidence} interval {gain.low:+.3g} to {gain.high:+.3g}, doubly "
            f"robust, {found.rows:,} rows)."
        )

    @property
    def _confidence(self) -> str:
        return f"{100 * self.evaluation.confidence:g} %"

    def _tables(self, form: str) -> tuple[str, str]:
        interval, estimates = f"{self._confidence} interval", self.evaluation.estimates
        headers = (f"field {self.field!r}", "reward", interval, "difference", interval, "rows")
        lines = [
            [name, *_cells(found.reward, ""), *_cells(found.difference, "+"), f"{found.rows:,}"]
            for name, found in estimates.items()
        ]
        facts = [("decided otherwise than the log did", f"{self.changed:.1%}")]
        if (overlap := self.evaluation.overlap) is not None:
            facts += [
                ("effective sample size", f"{overlap.effective_rows:,.1f} rows"),
                ("decisions without support in the log", f"{overlap.unsupported:.1%}"),
                (
                    "decisions against what the log usually takes",
                    f"{overlap.unusual:.1%}, worth {overlap.unusual_rows:,.1f} rows",
                ),
                ("importance weights", f"mean {overlap.mean_weight:.2f}, largest {overlap.largest_weight:.4g}"),
            ]
        facts += [
            (f"weighting leaves out: {reason}", f"{count:,} rows") for reason, count in self.evaluation.unusable.items()
        ]
        facts += [(f"set aside: {reason}", f"{count:,} rows") for reason, count in self.set_aside.items()]
        intervals = [interval for found in estimates.values() for interval in (found.reward, found.difference)]
        if any(np.isnan(interval.low) for interval in intervals):
            facts.append(("-", "no interval: what the rows say of it does not vary"))
        return (
            table(lines, headers=headers, form=form),
            table(facts, form="plain" if form == "simple" else form),
        )

    def __str__(self) -> str:
        return "\n\n".join((self.sentence, *self._tables("simple")))

    def _repr_html_(self) -> str:
        return "\n".join((f"<p><b>{escape(self.sentence)}</b></p>", *self._tables("html")))


def compare(
    logged: Sequence[Feedback] | str | Path,
    candidate: dspy.Module,
    *,
    baseline: dspy.Module | None = None,
    field: str | None = None,
    stochastic: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Estimate from a log whether a candidate would have earned more than what decided then, without running it.

    A log that explores earns less than the program it explores for: give that program as `baseline`, and the question
    becomes whether the candidate is better than it.

    The verdict rests on the doubly robust estimate of the difference a row. It is evidence, as far as its interval
    goes, which takes requests for independent draws of those to come, and propensities for right. Rows of one run, and
    runs of one request, are resampled together; what else rows share, such as a user or a day, is not known.

    There is no verdict where the log cannot judge the candidate: `Comparison.objections` then says why, and how many
    rows would do. Of a candidate that changes a fifth of the decisions among four options, nine logs in ten gave a
    verdict from 500 rows on where all decisions were drawn (`explore_decisions(1.0)`), from 1,000 at a share of 0.5,
    2,500 at 0.2 and 5,000 at 0.1. One that was no better was to be switched to in 3 to 6 % of those. (The intervals of
    shorter logs would have said so in up to 71 %; `benchmarks/log_length.py`.)

    What is judged are runs of one decision, and decisions that were rewarded themselves, by `run.reward(...,
    decision=id)`; rows whose reward is for all decisions of a run are set aside.

    Args:
        logged: Feedback rows with propensities and rewards, or the path of a log of them. Rows that the candidate
            learned from flatter it: keep some back, with `dspy_router.feedback.split_feedback`.
        candidate: A route, or a program that holds the one that the log is about.
        baseline: A program like the candidate, with which it is compared; by default the log as it was.
        field: The output field to compare; needed only if the log is about several.
        stochastic: Judge a candidate that draws from its probabilities, instead of one that takes the likeliest
            option, which is what a route does when called.
        confidence: Of the intervals, in (0, 1).
        seed: Draws the folds of the reward model and the bootstrap's resamples.

    Raises:
        RouteError: If `confidence` is not in (0, 1), or the log is about none of the candidate's decisions, or about
            several of them.

    Example:
        >>> import random
        >>> from dspy_router import DifferentiableRoute, Feedback
        >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
        >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
        >>> draw = random.Random(0)
        >>> rows = []
        >>> for number in range(400):  # whatever was asked for, either was served with 0.5
        ...     wanted, served = draw.choice(["fig", "date"]), draw.choice(["fig", "date"])
        ...     text, reward = f"a {wanted}, order {number}", float(served == wanted)
        ...     rows.append(Feedback("log", text, "", "fruit", text, ("fig", "date"), served, 0.5, reward))
        >>> comparison = compare(rows, route)
        >>> comparison.verdict, round(comparison.evaluation.estimates["doubly robust"].reward.value, 2)
        ('switch', 1.0)
    """
    if isinstance(logged, (str, Path)):
        logged = read_feedback(logged)
    names, route, decided = _subject(logged, candidate, field)
    reasons = [_reason(row, names, decided) for row in logged]
    usable = [reason is None for reason in reasons]
    rows = list(compress(logged, usable))
    requests = list(compress((first.example or first.text for first in first_of_run(logged)), usable))
    set_aside = Counter(reason for reason in reasons if reason is not None)
    compared = _logged_rows(rows, requests, route, decided, stochastic, seed)
    other = None
    if baseline is not None:
        _, other_route, other_field = _subject(logged, baseline, decided.name)
        if other_field.option_names != decided.option_names:
            raise RouteError(
                f"The baseline decides {decided.name!r} among {list(other_field.option_names)}, the candidate among "
                f"{list(decided.option_names)}: build both with the same options in the same order."
            )
        other = _policy(rows, other_route, other_field, stochastic)
    evaluation = evaluate_policy(compared, baseline=other, confidence=confidence, seed=seed)
    changed = 1 - float(np.take_along_axis(compared.policy, compared.chosen[:, None], axis=1).mean()) if rows else 0.0
    return Comparison(
        decided.name, evaluation, changed, set_aside, tuple(objections(evaluation, set_aside)), baseline is not None
    )


def _subject(
    rows: Sequence[Feedback], candidate: dspy.Module, field: str | None
) -> tuple[set[str], DifferentiableRoute, DecisionField]:
    """The candidate's route and field that the rows are about, with the names the rows give the route."""
    from dspy_router.optimizers.runs import find_routes  # brings torch

    sites = [
        (name, route, decided)
        for name, route in find_routes(candidate).items()
        for decided in route.decision_fields
        if field in (None, decided.name)
    ]
    named = [site for site in sites if any((row.route, row.field) == (site[0], site[2].name) for row in rows)]
    alike = [site for site in sites if _names_alike(rows, site[2])]
    found = named or alike
    decisions = ", ".join(f"{decided.name!r} of route {name!r}" for name, _, decided in found or sites) or "nothing"
    if not found:
        seen = sorted({f"{row.field!r} among {list(row.candidates)}" for row in rows})
        raise RouteError(
            f"The log decides {'; '.join(seen[:5]) or 'nothing'}. The candidate decides {decisions}"
            f"{'' if field is None else f' where field={field!r}'}: a field and its options must be the same in both."
        )
    if len(found) > 1:
        raise RouteError(
            f"The log is about several of the candidate's decisions, {decisions}: name one with field=, or pass its "
            "route as the candidate."
        )
    name, route, decided = found[0]
    names = {name} if named else _names_alike(rows, decided) - {""}
    if len(names) > 1:
        raise RouteError(
            f"The log is about several routes that decide {decided.name!r}, {sorted(names)}: pass the rows of one, "
            f"such as [row for row in rows if row.route == {min(names)!r}]."
        )
    return names | {""}, route, decided


def _cells(interval: Interval, sign: str) -> tuple[str, str]:
    """A figure and its interval as they are shown, "-" for what there is not."""
    value, low, high = (f"{number:{sign}.4g}" for number in (interval.value, interval.low, interval.high))
    return "-" if np.isnan(interval.value) else value, "-" if np.isnan(interval.low) else f"{low} to {high}"


def _names_alike(rows: Sequence[Feedback], decided: DecisionField) -> set[str]:
    """What the rows with a field's name and options call its route."""
    options = decided.positions.keys()
    return {row.route for row in rows if row.field == decided.name and _among(row, options)}


def _among(row: Feedback, options: Set[str]) -> bool:
    """Whether a row was decided among these options."""
    return not row.candidates or set(row.candidates) == options


def _reason(row: Feedback, names: set[str], decided: DecisionField) -> str | None:
    """Why a row cannot be used, or None if it can."""
    if row.source not in DECIDED:
        return f"source {row.source!r} is no decision that was taken"
    if row.field != decided.name or row.route not in names:
        return "of another route or field"
    if not _among(row, decided.positions.keys()):
        return "decided among other options"
    if row.chosen not in decided.positions:
        return "took what is no option"
    if not row.sole:
        return "its reward is for all decisions of its run: reward single ones by id"
    if row.reward is None:
        return "no reward"
    return None if row.has_reward else "reward not finite"


def _logged_rows(
    rows: Sequence[Feedback],
    requests: Sequence[str],
    route: DifferentiableRoute,
    decided: DecisionField,
    stochastic: bool,
    seed: int,
) -> LoggedRows:
    """The rows as arrays, grouped by request, with the candidate's policy and what a reward model predicts."""
    vectors = _vectors(rows, route)
    policy = _policy(rows, route, decided, stochastic)
    options = policy.shape[1]
    index = {name: number for number, name in enumerate(decided.option_names)}
    chosen = np.array([index[row.chosen] for row in rows], int)
    propensity = np.array([np.nan if row.propensity is None else row.propensity for row in rows], float)
    reward = np.array([row.reward for row in rows], float)
    keys, group = np.unique(requests, return_inverse=True)
    predicted = np.zeros(policy.shape)  # with one example there is no estimate
    if len(keys) > 1:
        predicted = cross_fitted_rewards(vectors, chosen, reward, options, group, seed=seed)
    return LoggedRows(policy, chosen, propensity, reward, predicted, group)


def _vectors(rows: Sequence[Feedback], route: DifferentiableRoute) -> np.ndarray:
    progress = partial(tqdm, desc="encoding", unit="batch", delay=2)
    return route.encoder.encode([row.text for row in rows], progress=progress)


def _policy(
    rows: Sequence[Feedback], route: DifferentiableRoute, decided: DecisionField, stochastic: bool
) -> np.ndarray:
    """The route's probabilities on the rows, or 1 for the likeliest option."""
    policy = decided.policy(route, _vectors(rows, route))
    return policy if stochastic else np.eye(policy.shape[1])[policy.argmax(axis=1)]
