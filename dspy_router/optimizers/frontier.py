"""What reward can be had at what cost: the frontier of routes trained for other weights of the cost."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import KFold
from tqdm.auto import tqdm

from dspy_router.feedback import Feedback
from dspy_router.heads import OptionHead
from dspy_router.learning.fit import fit_head
from dspy_router.learning.rows import Objective, TargetRows
from dspy_router.optimizers.graded import field_values
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.runs import Routes

# Of the weight asked for, or of the one at which the whole range of rewards is worth the whole range of costs.
STEPS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
FOLDS = 2


@dataclass(frozen=True)
class FrontierPoint:
    """What a route trained for one weight of the cost earns and costs.

    Attributes:
        cost_weight: Reward that one unit of cost is worth.
        reward: Mean reward a run, the cost not taken off.
        cost: Mean cost a run, in the unit of the compile.
    """

    cost_weight: float
    reward: float
    cost: float


def frontier(routes: Routes, tried: Sequence[Feedback], reading: RewardReading) -> tuple[FrontierPoint, ...]:
    """The frontier by what was tried, cheapest last; empty if runs cost nothing or one reward is for several decisions.

    For each weight a head is fitted to half of the inputs and asked about the other half, and the other way round.
    What its choices earn and cost is known where they were tried, and else predicted from inputs it did not see.
    """
    if len({(row.route, row.field) for row in tried}) != 1 or any(not row.sole for row in tried):
        return ()
    reward_of = field_values(routes, tried, lambda row: float(row.reward or 0.0))
    [(key, rewards)] = reward_of.items()
    if key[1] not in routes[key[0]].head.fields:  # one option of a list
        return ()
    costs = field_values(routes, tried, reading.cost)[key]
    rewards_range, costs_range = np.ptp(rewards.tries.reward), np.ptp(costs.tries.reward)
    if len(rewards.inputs) < FOLDS or rewards_range == 0 or costs_range == 0:
        return ()
    route = routes[key[0]]
    vectors = route.encoder.encode([text for _, text in rewards.inputs])
    option_vectors = route.head[key[1]].option_vectors
    # Shuffled: the order of a log may say what an input is.
    folds = list(KFold(FOLDS, shuffle=True, random_state=0).split(vectors))
    unit = reading.cost_weight or float(rewards_range / costs_range)
    points = []
    for step in tqdm(STEPS, desc="frontier", unit="weight", delay=2, leave=False):
        net = rewards.values - step * unit * costs.values
        scaled = (net - net.min()) / max(float(np.ptp(net)), 1e-9)
        chosen = np.zeros(len(vectors), int)
        for seen, held_out in folds:
            head = OptionHead(copy.deepcopy(option_vectors))
            fit_head(head, vectors[seen], TargetRows.of(Objective.REWARD, scaled[seen]))
            chosen[held_out] = head.policy(vectors[held_out]).argmax(axis=1)
        rows = np.arange(len(chosen))
        points.append(
            FrontierPoint(
                step * unit, float(rewards.values[rows, chosen].mean()), float(costs.values[rows, chosen].mean())
            )
        )
    return tuple(points)
