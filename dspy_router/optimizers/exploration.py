"""Spending rollouts where they teach.

Rollouts are made in rounds, and the heads are fitted again after each. Part of a round goes to examples never run
before, which take the policy's best guess. The rest goes where an outcome says most (`learning.information`): to
the choice whose success is nearest a toss-up, given all outcomes so far. So an example that failed is tried with its
next best option and one that succeeded is left alone; and where the metric turns out to be noisy, what looks wrong
is looked at again. Options that the policy overlooks are lifted until their tries speak against them.

A rollout forces the decisions that lead to the choice and the choice itself; what follows is the policy's.

Graded rewards are explored by `graded_exploration`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspy_router.feedback import Feedback
from dspy_router.learning.evidence import Choice, Posterior, RunEvidence
from dspy_router.learning.information import information, lift_rare_options, measured_noise
from dspy_router.optimizers.graded_exploration import graded_jobs
from dspy_router.optimizers.outcomes import TRIED, RewardReading
from dspy_router.optimizers.rollouts import Job, KeyedExample, Rollout, RolloutRunner
from dspy_router.optimizers.runs import (
    FieldKey,
    Routes,
    decided_fields,
    forced_path,
    open_options,
    policies_at,
    run_evidence,
)
from dspy_router.optimizers.sources import likely_texts

ROUNDS = 12
MOST_ROUNDS = 24  # rounds get smaller once little is left to learn
SMALLEST_ROUND = 8
FRESH_SHARE = 0.3  # of a round, for examples never run before; of 0.3, 0.5, 0.7 and 1 the best where RARE_SHARE was
REPEATS = 200  # most runs made twice to see whether the metric is noisy
REPEATED_SHARE = 0.01  # of the budget, but
FEWEST_REPEATS, LARGEST_REPEATED_SHARE = 30, 0.05  # where it is small, enough to notice a noise of 10 %
# Nats. Rollouts that promise less are saved: of what is known well enough.
SMALLEST_GAIN = 1e-5
SMALLEST_NOISY_GAIN = 1e-3
# After all others failed, the last option is tried where it is at least so likely that none is right; else presumed.
SMALLEST_DOUBT = 0.05


@dataclass(frozen=True)
class Explored:
    """A feedback row for every decision of every rollout, and the rewards as they turned out to be."""

    feedback: list[Feedback]
    reading: RewardReading


def explore(
    runner: RolloutRunner,
    routes: Routes,
    examples: Sequence[KeyedExample],
    *,
    known: Sequence[Feedback] = (),
    budget: int,
    reading: RewardReading,
    measure_noise: bool,
    seed: int,
    fit: Callable[[list[Feedback], RewardReading], None],
    on_done: Callable[[Rollout], object] | None = None,
) -> Explored:
    """Spend up to `budget` rollouts on the examples.

    Args:
        runner: Runs and scores the program.
        routes: The program's routes by name.
        examples: What to run it on.
        known: What was tried before, which is not tried again.
        budget: Most rollouts.
        reading: What rewards mean.
        measure_noise: Whether to repeat a few runs to see how often the metric contradicts itself.
        seed: Of the order in which examples are first run, and of what is drawn.
        fit: Fits the routes' heads to all feedback so far; called after each round but the last.
        on_done: Called with each finished rollout.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(examples))
    feedback: list[Feedback] = []
    looks: Counter[int] = Counter()
    spent, round_size = 0, max(SMALLEST_ROUND, -(-budget // ROUNDS))
    repeats = max(REPEATED_SHARE * budget, min(FEWEST_REPEATS, LARGEST_REPEATED_SHARE * budget))
    repeats = min(REPEATS, int(repeats)) if measure_noise else 0
    likely: dict[str, list[str | None]] = {}
    keys = {entry.key for entry in examples}
    known = [row for row in known if row.source in TRIED and row.has_reward and row.example in keys]
    met = {row.example for row in known}
    for _ in range(MOST_ROUNDS):
        if spent >= budget:
            break
        size = min(round_size, budget - spent)
        fresh = [int(index) for index in order if not looks[int(index)] and examples[index].key not in met]
        if reading.graded([*known, *feedback]):
            jobs = graded_jobs(routes, examples, [*known, *feedback], reading, fresh, size)
        else:
            jobs = _jobs(runner.program, routes, examples, [*known, *feedback], reading, fresh, size, likely)
        jobs = [replace(job, look=looks[job.example]) for job in jobs]
        if spent == 0 and repeats and len(jobs) > repeats:
            jobs = jobs[: size - repeats]
            jobs += [replace(job, look=1) for job in jobs[:repeats]]
        if not jobs:
            break
        rollouts = runner.run(jobs, examples, phase="train", on_done=on_done)
        for job, rollout in zip(jobs, rollouts, strict=True):
            feedback += rollout_feedback(rollout, routes, run=f"{rollout.example}/{looks[job.example]}")
            looks[job.example] += 1
        if spent == 0 and repeats and not reading.graded(feedback):
            reading = replace(reading, noise=_noise(jobs, rollouts, reading))
        spent += len(jobs)
        if spent < budget:
            fit(feedback, reading)
    return Explored(feedback, reading)


def rollout_feedback(rollout: Rollout, routes: Routes, run: str) -> list[Feedback]:
    """A row for every decision of a rollout."""
    fields = decided_fields(routes)
    return [
        Feedback(
            source="rollout",
            example=rollout.example,
            route=decision.site.route,
            field=decision.site.field,
            occurrence=decision.site.occurrence,
            text=decision.text,
            candidates=decision.candidates or fields[decision.site.route, decision.site.field].option_names,
            chosen=decision.chosen,
            propensity=decision.propensity,
            reward=rollout.reward,
            sole=len(rollout.decisions) == 1,
            cost=rollout.cost,
            tokens=rollout.tokens,
            error=rollout.error,
            run=run,
        )
        for decision in rollout.decisions
    ]


def _noise(jobs: Sequence[Job], rollouts: Sequence[Rollout], reading: RewardReading) -> float:
    """The share of wrong rewards by the runs that were made twice."""
    found: dict[int, list[bool]] = defaultdict(list)
    for job, rollout in zip(jobs, rollouts, strict=True):
        if rollout.reward is not None:
            found[job.example].append(rollout.reward >= reading.enough)
    return measured_noise([(pair[0], pair[1]) for pair in found.values() if len(pair) == 2])


def _jobs(
    program: object,
    routes: Routes,
    examples: Sequence[KeyedExample],
    feedback: Sequence[Feedback],
    reading: RewardReading,
    fresh: Sequence[int],
    size: int,
    likely: dict[str, list[str | None]],
) -> list[Job]:
    """The rollouts of the next round where a run either succeeds or does not."""
    numbers = {entry.key: index for index, entry in enumerate(examples)}
    tried = [row for row in feedback if row.has_reward]
    evidence = run_evidence(routes, tried, reading)
    _presume(program, routes, examples, evidence, {examples[index].key for index in fresh}, likely)
    first = list(fresh[: int(np.ceil(FRESH_SHARE * size))])
    left_out = set(first)
    jobs = [Job(index) for index in first]
    best: dict[int, tuple[float, Choice]] = {}
    for gain, choice in _candidates(routes, evidence, open_options(routes, evidence, tried), reading.noise):
        index = numbers[str(evidence.decisions[choice.field][choice.row].example)]
        if index not in left_out and (index not in best or gain > best[index][0]):
            best[index] = (gain, choice)
    ranked = sorted(best.items(), key=lambda item: -item[1][0])[: size - len(jobs)]
    jobs += [Job(index, forced_path(routes, evidence.path(choice))) for index, (_, choice) in ranked]
    # What is left of the round goes to examples of which nothing is known.
    unknown = [index for index in fresh if index not in left_out and index not in best]
    return jobs + [Job(index) for index in unknown[: size - len(jobs)]]


def _presume(
    program: object,
    routes: Routes,
    examples: Sequence[KeyedExample],
    evidence: RunEvidence[FieldKey],
    fresh: set[str],
    likely: dict[str, list[str | None]],
) -> None:
    """Add the first decision of examples not run yet, where all others began with one route reading their inputs.

    `likely` keeps what a route would read on each example from round to round.
    """
    firsts: dict[FieldKey, dict[object, str]] = {}
    for key, decisions in evidence.decisions.items():
        if found := {decided.example: decided.text for decided in decisions if decided.parent is None}:
            firsts[key] = found
    if not firsts and routes.get("self") is program:
        firsts["self", routes["self"].decision_fields[0].name] = {}
    if len(firsts) != 1:
        return
    [(key, seen)] = firsts.items()
    if key[0] not in likely:
        likely[key[0]] = likely_texts(routes[key[0]], examples)
    texts = likely[key[0]]
    if any(seen.get(entry.key, text) != text for entry, text in zip(examples, texts, strict=True)):
        return
    for entry, text in zip(examples, texts, strict=True):
        if entry.key in fresh and text is not None:
            evidence.decision(entry.key, key, text)


def _candidates(
    routes: Routes, evidence: RunEvidence[FieldKey], open_: Mapping[FieldKey, np.ndarray], noise: float
) -> list[tuple[float, Choice]]:
    """For each decision the choice that is worth trying most, with what its outcome would say."""
    policies = policies_at(routes, evidence, open_)
    posteriors = evidence.posterior(policies, noise, evidence.none_right(open_, noise))
    onward = _onward(evidence, posteriors)
    succeeded = _succeeded(evidence)
    found: list[tuple[float, Choice]] = []
    for key, posterior in posteriors.items():
        if not len(posterior.reach):
            continue
        successes, failures = evidence.outcomes(key)
        ruled_out = (failures > successes) & (noise == 0)
        likely_enough = np.where(ruled_out, 0.0, posterior.probability)
        lifted = lift_rare_options(likely_enough, posterior.reach, failures.sum(axis=0))
        # Without noise no choice is tried twice, and an example that has succeeded is left alone.
        closed = evidence.continued(key) | ((failures + successes > 0) & (noise == 0))
        if noise == 0:
            closed |= np.array([decided.example in succeeded for decided in evidence.decisions[key]])[:, None]
        lifted = np.where(closed | ~open_[key], -1.0, lifted)
        option = lifted.argmax(axis=1)
        row = np.arange(len(option))
        likely = lifted[row, option]
        ahead = np.where((successes + failures)[row, option] > 0, 1.0, onward[key])
        # That no option is right makes an outcome worth less, and is not itself what is asked, except of the last left.
        first = np.array([decided.parent is None for decided in evidence.decisions[key]])
        chance = np.where(first, 1.0, posterior.reach) * likely * ahead
        gain = np.where(first, posterior.reach, 1.0) * information(np.clip(chance, 0.0, 1.0), noise)
        left = first & ((open_[key] & ~closed).sum(axis=1) == 1)
        gain = np.where(left, information(posterior.reach * ahead, noise), gain)
        presumed = left & (posterior.reach > 1 - SMALLEST_DOUBT)
        worth = (likely >= 0) & ~presumed & (gain > (SMALLEST_NOISY_GAIN if noise else SMALLEST_GAIN))
        found += [(float(gain[index]), Choice(key, int(index), int(option[index]))) for index in np.flatnonzero(worth)]
    return found


def _succeeded(evidence: RunEvidence[FieldKey]) -> set[object]:
    """Examples with a run that succeeded."""
    return {
        evidence.decisions[key][row].example
        for key in evidence.options
        for row in np.flatnonzero(evidence.outcomes(key)[0].any(axis=1))
    }


def _onward(evidence: RunEvidence[FieldKey], posteriors: dict[FieldKey, Posterior]) -> dict[FieldKey, float]:
    """The chance that what follows a decision of each field is decided rightly, by the decisions that did follow."""
    chances: dict[FieldKey, list[float]] = {key: [] for key in evidence.options}
    for key, decisions in evidence.decisions.items():
        best = posteriors[key].probability.max(axis=1, initial=0.0)
        for row, decided in enumerate(decisions):
            if decided.parent is not None:
                chances[decided.parent.field].append(float(best[row]))
    return {key: float(np.mean(found)) if found else 1.0 for key, found in chances.items()}
