"""Estimates of a routing policy from logs, held against the truth, on RouteLLM's MMLU outcomes.

    python benchmarks/offline.py [--resamples N] [--prompts N]

Which of two LLMs should answer a question? Both outcomes of every question are known, so it is known what any policy
earns; the estimators see only logs. A decision earns 1 for a right answer, less a price for the stronger LLM, without
which it would always be the better choice.

- Prompts: a fixed random subset of the 14,042, each text once, as the encoder reads it (its first 256 word pieces).
- Candidate: logistic regressions of each LLM's outcome on the frozen sentence vectors, fitted to a part of the prompts
  that nothing else uses; it takes the LLM with the larger expected reward.
- Log: some of the other prompts, drawn without replacement; the cheaper LLM is taken with probability 0.8.
- Truth: the candidate's mean reward over all the other prompts, a finite population. Logs are drawn from it without
  replacement and the intervals do not know that, so they are somewhat wider than they need be.

Every setting is the package's default. The bar: the doubly robust 95 % interval covers the truth in at least 93 % of
the logs, and its root mean squared error is no larger than that of IPS.
"""

import argparse
import gzip
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from common import DATA, print_table
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from dspy_router import SentenceEncoder
from dspy_router.evaluation.objections import objections
from dspy_router.evaluation.offline import Interval, LoggedRows, OfflineEvaluation, evaluate_policy
from dspy_router.learning.reward_model import cross_fitted_rewards

LLMS = ("mixtral", "gpt4")
PRICE = np.array([0.0, 0.1])
LOGGING = np.array([0.8, 0.2])
TRAIN = 2000  # prompts the candidate learns from
LOGGED = 2000  # prompts of a log
COVERAGE_BAR = 0.93
HEADERS = ("estimator", "bias", "RMSE", "coverage %", "mean width", "RMSE", "coverage %", "mean width")


@dataclass(frozen=True)
class Population:
    """The evaluation prompts: float32 [n, d] vectors, float [n, 2] rewards, float [n, 2] candidate's policy."""

    vectors: np.ndarray
    rewards: np.ndarray
    policy: np.ndarray

    @property
    def truth(self) -> float:
        """What the candidate earns."""
        return float((self.policy * self.rewards).sum(axis=1).mean())

    @property
    def logged(self) -> float:
        """What the logging policy earns."""
        return float((self.rewards @ LOGGING).mean())


def main() -> None:
    """Log, estimate, and print how the estimates fare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=300, help="logs drawn")
    parser.add_argument("--prompts", type=int, default=7000, help="prompts used; encoding them takes most of the time")
    options = parser.parse_args()
    prompts, outcomes = read_outcomes(options.prompts)
    encoder = SentenceEncoder(cache_size=0)
    vectors = encoder.encode(prompts, progress=lambda batches: tqdm(batches, desc="encoding", unit="batch"))
    population = with_candidate(vectors, outcomes)
    seeds = tqdm(range(options.resamples), desc="logs", unit="log")
    found = [evaluate_policy(log(population, seed), seed=seed) for seed in seeds]
    report(population, found)


def read_outcomes(count: int) -> tuple[list[str], np.ndarray]:
    """So many prompts, each text once, and the LLMs' outcomes, float [n, 2]."""
    with gzip.open(DATA / "routellm_mmlu" / "outcomes.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    by_text = {rows[number]["text"]: rows[number] for number in np.random.default_rng(0).permutation(len(rows))}
    chosen = list(by_text.values())[:count]
    return [row["text"] for row in chosen], np.array([[row[llm] for llm in LLMS] for row in chosen], float)


def with_candidate(vectors: np.ndarray, outcomes: np.ndarray) -> Population:
    """The prompts after the first `TRAIN`, and the policy learned from those."""
    models = [LogisticRegression().fit(vectors[:TRAIN], outcome) for outcome in outcomes[:TRAIN].T]
    right = np.stack([model.predict_proba(vectors[TRAIN:])[:, 1] for model in models], axis=1)
    policy = np.eye(len(LLMS))[(right - PRICE).argmax(axis=1)]
    return Population(vectors[TRAIN:], outcomes[TRAIN:] - PRICE, policy)


def log(population: Population, seed: int) -> LoggedRows:
    """A log by the logging policy, with the candidate's policy and the reward model's predictions."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(population.vectors), LOGGED, replace=False)
    chosen = generator.choice(len(LLMS), LOGGED, p=LOGGING)
    reward, group = population.rewards[drawn, chosen], np.arange(LOGGED)
    predicted = cross_fitted_rewards(population.vectors[drawn], chosen, reward, len(LLMS), group, seed=seed)
    return LoggedRows(population.policy[drawn], chosen, LOGGING[chosen], reward, predicted, group)


def report(population: Population, found: list[OfflineEvaluation]) -> None:
    """The tables, and whether the bar is met."""
    truth, gain = population.truth, population.truth - population.logged
    lines, errors, coverages = [], {}, {}
    for name in ("direct method", "IPS", "SNIPS", "doubly robust"):
        bias, errors[name], coverages[name], width = scores([one.estimates[name].reward for one in found], truth)
        _, error, coverage, wide = scores([one.estimates[name].difference for one in found], gain)
        lines.append([name, f"{bias:+.4f}", f"{errors[name]:.4f}", f"{100 * coverages[name]:.1f}", f"{width:.4f}",
                      f"{error:.4f}", f"{100 * coverage:.1f}", f"{wide:.4f}"])  # fmt: skip
    print_table(
        f"{len(found)} logs of {LOGGED:,} of {len(population.vectors):,} prompts. The candidate takes {LLMS[1]} for "
        f"{population.policy[:, 1].mean():.1%} and earns {truth:.4f} a decision, the logging policy "
        f"{population.logged:.4f}.\nLeft: the candidate's reward. Right: its difference to the log, truly {gain:+.4f}.",
        HEADERS,
        lines,
    )
    gains = [one.estimates["doubly robust"].difference for one in found if not objections(one)]
    verdicts = Counter("switch" if one.low > 0 else "worse" if one.high < 0 else "no difference shown" for one in gains)
    effective = np.mean([one.overlap.effective_rows for one in found])
    print(
        f"\nVerdicts: {dict(verdicts)}, none: {len(found) - len(gains)}. Effective sample size: {effective:,.0f} rows."
    )
    coverage, ratio = coverages["doubly robust"], errors["doubly robust"] / errors["IPS"]
    met = coverage >= COVERAGE_BAR and ratio <= 1
    print(
        f"The bar is {'met' if met else 'NOT met'}: doubly robust covers {coverage:.1%} (at least {COVERAGE_BAR:.0%}), "
        f"RMSE {ratio:.2f} times that of IPS (at most 1)."
    )


def scores(intervals: list[Interval], truth: float) -> tuple[float, float, float, float]:
    """Bias, root mean squared error, share of intervals that cover the truth, and their mean width."""
    error = np.array([interval.value - truth for interval in intervals])
    covers = [interval.low <= truth <= interval.high for interval in intervals]
    width = [interval.high - interval.low for interval in intervals]
    return float(error.mean()), float(np.sqrt((error**2).mean())), float(np.mean(covers)), float(np.mean(width))


if __name__ == "__main__":
    main()
