"""How long a log must be, and how much it must explore, for a verdict on a candidate.

    python benchmarks/log_length.py [--logs N]  (ten minutes)

Simulated logs of four options, of which one is right for a request: it earns 1 with probability 0.9, the others with
0.1. What decides is right in 78 % of the requests. It decides as it always does but for a share of the decisions, which
are drawn near its policy as `explore_decisions` draws them. The inputs tell nothing about the rewards, so that the
reward model of the doubly robust estimate helps little, and the log must speak for itself.

Two candidates are held against what decides: one that is better, right in 99 % of the requests, and one that is no
better, because it repairs half of the errors and makes as many new ones. For each share and length: in how many logs
`compare` would give a verdict on the better one, in how many it would say to switch, and in how many it would say so of
the one that is no better (2.5 % by the level of the interval). The last column is what the interval alone would say of
that one, without the objections to what the log is too little for.
"""

import argparse

import numpy as np
from common import print_table
from tqdm.auto import tqdm

from dspy_router.evaluation import offline
from dspy_router.evaluation.objections import objections
from dspy_router.evaluation.offline import LoggedRows, OfflineEvaluation, evaluate_policy
from dspy_router.learning.reward_model import cross_fitted_rewards
from dspy_router.overrides import EVEN_SHARE

OPTIONS, WRONG = 4, 0.22
EARNS = (0.1, 0.9)  # of a wrong and of the right option
SURE = (0.63, 0.85)  # probability that what decides gives its option, if wrong and if right
LENGTHS = {1.0: (100, 300, 500, 1000), 0.5: (300, 500, 1000), 0.2: (300, 1000, 2500), 0.1: (300, 1000, 5000)}
HEADERS = ("share drawn", "rows", "verdict %", "switch %", "no better: switch %", "by the interval alone %")


def main() -> None:
    """Simulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=100, help="logs drawn of each kind")
    logs = parser.parse_args().logs
    offline.RESAMPLES = 400  # enough for ends that are counted over many logs
    settings = [(share, rows) for share, lengths in LENGTHS.items() for rows in lengths]
    lines = []
    for share, rows in tqdm(settings, desc="settings", unit="setting"):
        better = [judged(share, rows, seed, better=True) for seed in range(logs)]
        equal = [judged(share, rows, seed, better=False) for seed in range(logs)]
        shares = (
            [not objections(one) for one in better],
            [switches(one) and not objections(one) for one in better],
            [switches(one) and not objections(one) for one in equal],
            [switches(one) for one in equal],
        )
        lines.append([f"{share:g}", f"{rows:,}", *(f"{100 * np.mean(column):.1f}" for column in shares)])
    print_table(f"{logs} logs of each kind.", HEADERS, lines)


def judged(share: float, rows: int, seed: int, *, better: bool) -> OfflineEvaluation:
    """What a log says of a candidate, compared with what decides."""
    generator = np.random.default_rng(seed)
    right = generator.integers(OPTIONS, size=rows)
    other = (right + generator.integers(1, OPTIONS, size=rows)) % OPTIONS
    usual = np.where(generator.random(rows) < WRONG, other, right)
    if better:
        candidate = np.where(generator.random(rows) < 0.05, usual, right)
    else:
        broken = generator.random(rows) < WRONG / (1 - WRONG) / 2
        repaired = np.where(generator.random(rows) < 0.5, right, usual)
        candidate = np.where(usual == right, np.where(broken, other, right), repaired)
    sure = np.where(usual == right, SURE[1], SURE[0])[:, None]
    policy = np.where(np.eye(OPTIONS)[usual] == 1, sure, (1 - sure) / (OPTIONS - 1))
    chances = (1 - share) * np.eye(OPTIONS)[usual] + share * ((1 - EVEN_SHARE) * policy + EVEN_SHARE / OPTIONS)
    chosen = (generator.random(rows)[:, None] > chances.cumsum(axis=1)).sum(axis=1).clip(0, OPTIONS - 1)
    reward = (generator.random(rows) < np.where(chosen == right, EARNS[1], EARNS[0])).astype(float)
    vectors = generator.normal(size=(rows, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    group = np.arange(rows)
    predicted = cross_fitted_rewards(vectors, chosen, reward, OPTIONS, group, seed=seed)
    logged = LoggedRows(np.eye(OPTIONS)[candidate], chosen, chances[group, chosen], reward, predicted, group)
    return evaluate_policy(logged, baseline=np.eye(OPTIONS)[usual], seed=seed)


def switches(evaluation: OfflineEvaluation) -> bool:
    """Whether the interval of the difference lies above 0."""
    return evaluation.estimates["doubly robust"].difference.low > 0


if __name__ == "__main__":
    main()
