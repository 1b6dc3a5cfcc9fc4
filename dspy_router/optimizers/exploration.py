"""Spending rollouts where they teach.

Every rollout forces one decision at most; the rest of the run follows the policy. A first run of an example
takes the policy's best guess. An example that reached the best reward is done; where a run failed, the
likeliest option not tried yet comes next. In each round the examples with the best chance go first, and the
heads are fitted again before the next, so that early successes sharpen the guesses that follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspy_router.feedback import Feedback
from dspy_router.learning.trials import next_options
from dspy_router.optimizers.learner import Routes
from dspy_router.optimizers.rollouts import Job, KeyedExample, Rollout, RolloutRunner, Site

ROUNDS = 12
SMALLEST_ROUND = 8


@dataclass
class _Progress:
    """What is known of one example: its decision sites and the options tried at each."""

    sites: list[tuple[Site, str]] | None
    tried: dict[Site, set[int]] = field(default_factory=dict)
    runs: int = 0
    done: bool = False


def explore(
    runner: RolloutRunner,
    routes: Routes,
    examples: Sequence[KeyedExample],
    texts: Sequence[list[tuple[Site, str]] | None],
    *,
    budget: int,
    best_reward: float,
    seed: int,
    fit: Callable[[list[Feedback]], None],
    on_done: Callable[[Rollout], object] | None = None,
) -> list[Feedback]:
    """Spend up to `budget` rollouts on the examples; returns a feedback row for every decision of every run.

    Args:
        runner: Runs and scores the program.
        routes: The program's routes by name.
        examples: What to run it on.
        texts: For each example, the sites and texts known beforehand, or None.
        budget: Most rollouts.
        best_reward: An example that earned this needs no further rollout.
        seed: Of the order in which examples are run about which nothing is known.
        fit: Fits the routes' heads to all feedback so far; called between rounds.
        on_done: Called with each finished rollout.
    """
    order = np.random.default_rng(seed).random(len(examples))
    states = [_Progress(known) for known in texts]
    feedback: list[Feedback] = []
    spent = 0
    round_size = max(SMALLEST_ROUND, -(-budget // ROUNDS))
    while spent < budget:
        chances, forced = _next_trials(states, routes, order)
        best_first = np.argsort(-chances, kind="stable")[: min(round_size, budget - spent)]
        jobs = [Job(int(index), forced[index]) for index in best_first if chances[index] > 0]
        if not jobs:
            break
        for job, rollout in zip(jobs, runner.run(jobs, examples, phase="train", on_done=on_done), strict=True):
            _learn(states[job.example], rollout, routes, best_reward)
            feedback += rollout_feedback(rollout, routes)
        spent += len(jobs)
        if spent < budget:
            fit(feedback)
    return feedback


def rollout_feedback(rollout: Rollout, routes: Routes) -> list[Feedback]:
    """A row for every decision of a rollout."""
    candidates = {
        (name, decided.name): decided.option_names for name, route in routes.items() for decided in route.fields
    }
    return [
        Feedback(
            source="rollout",
            example=rollout.example,
            route=decision.site.route,
            field=decision.site.field,
            occurrence=decision.site.occurrence,
            text=decision.text,
            candidates=candidates[decision.site.route, decision.site.field],
            chosen=decision.chosen,
            propensity=decision.propensity,
            reward=rollout.reward,
            sole=len(rollout.decisions) == 1,
            cost=rollout.cost,
            error=rollout.error,
        )
        for decision in rollout.decisions
    ]


def _learn(state: _Progress, rollout: Rollout, routes: Routes, best_reward: float) -> None:
    first = state.runs == 0
    state.runs += 1
    state.done = rollout.reward >= best_reward or not rollout.decisions
    if first:
        state.sites = [(decision.site, decision.text) for decision in rollout.decisions]
    forced = {site for site, _ in rollout.forced}
    for decision in rollout.decisions:
        if first or decision.site in forced:
            names = _names(routes, decision.site)
            state.tried.setdefault(decision.site, set()).add(names.index(decision.chosen))
    # An option that could not be forced because the run no longer came by is not tried for ever.
    for site, option in rollout.forced:
        state.tried.setdefault(site, set()).add(_names(routes, site).index(option))


def _next_trials(
    states: Sequence[_Progress], routes: Routes, order: np.ndarray
) -> tuple[np.ndarray, list[tuple[tuple[Site, str], ...]]]:
    """For each example, the chance that its next rollout succeeds (0 if none is left) and what it forces."""
    chances = np.zeros(len(states))
    forced: list[tuple[tuple[Site, str], ...]] = [()] * len(states)
    options: dict[tuple[int, Site], tuple[int, float, float]] = {}
    for name, route in routes.items():
        for decided in route.fields:
            entries = [
                (index, site, text)
                for index, state in enumerate(states)
                if not state.done
                for site, text in state.sites or ()
                if (site.route, site.field) == (name, decided.name)
            ]
            if not entries:
                continue
            policy = route.head[decided.name].policy(route.encoder.encode([text for _, _, text in entries]))
            tried = np.zeros(policy.shape, dtype=bool)
            for row, (index, site, _) in enumerate(entries):
                tried[row, list(states[index].tried.get(site, ()))] = True
            option, chance = next_options(policy, tried)
            found = zip(option.tolist(), chance.tolist(), policy.max(axis=1).tolist(), strict=True)
            options.update({(index, site): values for (index, site, _), values in zip(entries, found, strict=True)})
    for index, state in enumerate(states):
        if state.done:
            continue
        if state.sites is None:
            chances[index] = 1.0 + order[index]  # nothing is known yet: first, in a random order
            continue
        if not state.sites:
            continue
        likeliest = {site: options[index, site][2] for site, _ in state.sites}
        joint = float(np.prod(list(likeliest.values())))
        if state.runs == 0:
            chances[index] = joint
            continue
        for site, _ in state.sites:
            option_index, alone, _ = options[index, site]
            together = alone * joint / likeliest[site]
            if option_index >= 0 and together > chances[index]:
                chances[index] = together
                forced[index] = ((site, _names(routes, site)[option_index]),)
    return chances, forced


def _names(routes: Routes, site: Site) -> tuple[str, ...]:
    return next(decided.option_names for decided in routes[site.route].fields if decided.name == site.field)
