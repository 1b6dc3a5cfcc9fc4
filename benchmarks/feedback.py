"""Learning tool choice from rewards alone, against contextual bandits, and what it costs.

    python benchmarks/feedback.py [--seeds N] [--only rewards|noise|decisions|overhead]

No label is shown to any method: each asks, for a training text and an option, whether it is the right one, and is told
1 or 0. All work on the same frozen sentence vectors, take the examples in the same random order and get the same
number of rewards, and all are given the options' names as prior. `RouteFinetune` chooses which examples to ask about
again; the bandits, which take examples as they come, go over them a second time. Nothing is tuned here.

The skyline is the same head fitted to all labels.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import ClassVar

import dspy
import numpy as np
import psutil
from bandits import LinTS, LinUCB, SquareCB
from common import DATA, VECTORS, Row, accuracy, examples, half_width, print_table, read
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.feedback import Feedback
from dspy_router.optimizers.learner import field_rows, fit_routes

BUDGETS = (0.5, 1.0, 1.5)
NOISE, NOISY_BUDGET = 0.1, 2.0
BANDITS = (SquareCB, LinUCB, LinTS)
OURS, SKYLINE = "RouteFinetune", "all labels"
DECISIONS_EXAMPLES, DECISIONS_BUDGET = 3_000, 4
WARM_UP = 100
OVERHEAD_ROLLOUTS = (1_000, 5_000, 20_000, 50_000)
FEEDBACK_ROWS = 50_000
OPTIONS, DIMENSION = 150, 384


def main() -> None:
    """Run what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="orders of the examples (default: %(default)s)")
    parser.add_argument("--only", choices=("rewards", "noise", "decisions", "overhead"), help="one part")
    parser.add_argument("--memory-of-a-fit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of_a_fit:
        print(memory_of_a_fit())
        return
    encoder = SentenceEncoder(cache_size=100_000, vector_cache=VECTORS)
    parts = (options.only,) if options.only else ("rewards", "noise", "decisions", "overhead")
    if "rewards" in parts:
        for dataset in ("clinc150", "banking77"):
            rewards_table(dataset, encoder, options.seeds, BUDGETS, noise=0.0)
    if "noise" in parts:
        rewards_table("clinc150", encoder, options.seeds, (1.0, NOISY_BUDGET), noise=NOISE)
    if "decisions" in parts:
        decisions_table(encoder, options.seeds)
    if "overhead" in parts:
        overhead_table()


def rewards_table(
    dataset: str, encoder: SentenceEncoder, seeds: int, budgets: Sequence[float], *, noise: float
) -> None:
    """Test accuracy of every method at every budget."""
    train, test = read(dataset, "train"), read(dataset, "test")
    encode(encoder, [*train, *test], dataset)
    route = DifferentiableRoute("text -> intent", tools=sorted({row.label for row in train}), encoder=encoder)
    found: dict[str, dict[float, list[float]]] = {}
    asked: dict[float, list[int]] = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(train))
        shuffled = [train[index] for index in order]
        for budget in tqdm(budgets, desc=f"{dataset}: {OURS}, seed {seed}", unit="budget"):
            reward = Rewards(noise, seed)
            optimizer = RouteFinetune(
                reward.metric, max_metric_calls=int(budget * len(train)), num_threads=1, seed=seed
            )
            compiled = optimizer.compile(route, trainset=wanted(shuffled))
            found.setdefault(OURS, {}).setdefault(budget, []).append(right(compiled, test))
            asked.setdefault(budget, []).append(reward.asked)
        for name, scores in bandit_scores(route, shuffled, test, budgets, noise, seed).items():
            for budget, score in scores.items():
                found.setdefault(name, {}).setdefault(budget, []).append(score)
    skyline = right(RouteFinetune().compile(route, trainset=examples(train)), test)
    rows = [
        [name, *(spread(scores[budget]) for budget in budgets)]
        for name, scores in sorted(found.items(), key=lambda item: -fmean(item[1][budgets[-1]]))
    ]
    rows.append([SKYLINE, *[f"{100 * skyline:.1f}"] * len(budgets)])
    used = ", ".join(f"{fmean(asked[budget]) / len(train):.2f} at {budget}" for budget in budgets)
    title = (
        f"{dataset}, {len(train):,} training texts, {len(route.fields[0].options)} options, {noise:.0%} of the rewards "
        f"flipped: right on the {len(test):,} test rows, %, mean ± standard deviation of {seeds} orders\n"
        f"(95 % Wilson interval of one figure: ± {100 * half_width(skyline, len(test)):.1f}; rewards an example that "
        f"{OURS} used: {used})"
    )
    print_table(title, ["rewards an example", *(f"≤ {budget}" for budget in budgets)], rows)


def bandit_scores(
    route: DifferentiableRoute, train: list[Row], test: list[Row], budgets: Sequence[float], noise: float, seed: int
) -> dict[str, dict[float, float]]:
    """Test accuracy of each bandit after each budget; what was learned at one goes on at the next."""
    names = route.fields[0].option_names
    vectors, test_vectors = (route.encoder.encode([row.text for row in rows]) for rows in (train, test))
    labels = np.array([names.index(row.label) for row in train])
    option_vectors = route.head["intent"].option_vectors.numpy()
    scores: dict[str, dict[float, float]] = {}
    for kind in tqdm(BANDITS, desc=f"bandits, seed {seed}", unit="bandit"):
        bandit, reward, done = kind(option_vectors, seed=seed), Rewards(noise, seed), 0
        for budget in budgets:
            until = int(budget * len(train))
            rows = np.arange(done, until) % len(train)
            bandit.learn(
                vectors[rows], lambda row, option, rows=rows, reward=reward: reward.of(labels[rows[row]] == option)
            )
            done = until
            chosen = [names[option] for option in bandit.choose(test_vectors)]
            scores.setdefault(bandit.name, {})[budget] = accuracy(chosen, [row.label for row in test])
    return scores


class Rewards:
    """0/1 rewards, a share of them flipped at random, and how many were asked for."""

    def __init__(self, noise: float, seed: int) -> None:
        self.noise = noise
        self.asked = 0
        self._generator = np.random.default_rng(1000 + seed)

    def of(self, right_one: bool) -> float:
        """The reward of a choice that is right or not."""
        self.asked += 1
        return float(bool(right_one) ^ bool(self._generator.random() < self.noise))

    def metric(self, example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
        """The same as a DSPy metric."""
        return self.of(prediction.intent == example.wanted)


def wanted(rows: Sequence[Row]) -> list[dspy.Example]:
    """Examples whose right intent only the metric sees."""
    return [dspy.Example(text=row.text, wanted=row.label).with_inputs("text") for row in rows]


def right(route: DifferentiableRoute, rows: Sequence[Row]) -> float:
    """Share of rows decided rightly."""
    predictions = route.batch([{"text": row.text} for row in rows])
    return accuracy([prediction.intent for prediction in predictions], [row.label for row in rows])


def encode(encoder: SentenceEncoder, rows: Sequence[Row], what: str) -> None:
    """Put the vectors of all texts into the encoder's cache."""
    encoder.encode(
        [row.text for row in rows], progress=lambda batches: tqdm(batches, desc=f"{what}: encoding", unit="batch")
    )


def spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    deviation = f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * fmean(scores):.1f}{deviation}"


class TwoDecisions(dspy.Module):
    """First the domain, then the intent in it, by a route of its own."""

    def __init__(self, domains: dict[str, list[str]], encoder: SentenceEncoder) -> None:
        super().__init__()
        self.domain = DifferentiableRoute("text -> domain", tools=list(domains), encoder=encoder)
        self.intents = {
            domain: DifferentiableRoute("text -> intent", tools=intents, encoder=encoder)
            for domain, intents in domains.items()
        }

    def forward(self, text: str) -> dspy.Prediction:
        """Decide twice."""
        domain = self.domain(text=text).domain
        return dspy.Prediction(intent=self.intents[domain](text=text).intent)


def decisions_table(encoder: SentenceEncoder, seeds: int) -> None:
    """A program of two decisions with one reward at its end."""
    domains = json.loads((DATA / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    train, test = read("clinc150", "train"), read("clinc150", "test")
    encode(encoder, [*train, *test], "clinc150")
    program = TwoDecisions(domains, encoder)

    def share(candidate: dspy.Module) -> float:
        return accuracy([candidate(text=row.text).intent for row in test], [row.label for row in test])

    before, after, used = share(program), [], []
    for seed in tqdm(range(seeds), desc="two decisions", unit="seed"):
        drawn = [train[index] for index in np.random.default_rng(seed).permutation(len(train))[:DECISIONS_EXAMPLES]]
        reward = Rewards(0.0, seed)
        budget = DECISIONS_BUDGET * len(drawn)
        optimizer = RouteFinetune(reward.metric, max_metric_calls=budget, num_threads=1, seed=seed)
        after.append(share(optimizer.compile(program, trainset=wanted(drawn))))
        used.append(reward.asked / len(drawn))
    title = (
        f"Two decisions a run ({len(domains)} domains, then the intents of one), {DECISIONS_EXAMPLES:,} of clinc150's "
        f"training texts, one 0/1 reward a run: right at the end, % of {len(test):,} test rows"
    )
    rows = [["untrained", "0", f"{100 * before:.1f}"], [OURS, f"{fmean(used):.2f}", spread(after)]]
    print_table(title, ["", "rollouts an example", "right"], rows)


def overhead_table() -> None:
    """What a compile takes beside the program's own time, by number of rollouts, and what a fit takes in memory.

    In CPU time, which other work on the machine does not lengthen.
    """
    rows = []
    for rollouts in tqdm((WARM_UP, *OVERHEAD_ROLLOUTS), desc="overhead", unit="size"):
        vectors, labels, encoder = synthetic(rollouts // 2)
        program = Timed(encoder)
        reward = Rewards(NOISE, 0)

        def metric(
            example: dspy.Example, prediction: dspy.Prediction, reward: Rewards = reward, labels: np.ndarray = labels
        ) -> float:
            return reward.of(int(prediction.option.removeprefix("option ")) == labels[int(example.text)])

        trainset = [dspy.Example(text=str(index)).with_inputs("text") for index in range(len(vectors))]
        optimizer = RouteFinetune(metric, max_metric_calls=rollouts, num_threads=1, max_errors=1)
        started = time.process_time()
        optimizer.compile(program, trainset=trainset)
        seconds = time.process_time() - started
        spent = optimizer.report.rollouts
        own = seconds - sum(Timed.seconds)
        rows.append([f"{spent:,}", f"{seconds:.0f}", f"{1e3 * median(Timed.seconds):.2f}", f"{1e3 * own / spent:.2f}"])
        Timed.seconds.clear()
    del rows[0]  # the warm-up, which imports what a compile needs
    print_table(
        f"A compile: {OPTIONS} options, {DIMENSION} dimensions, two rollouts an example, {NOISE:.0%} noise; CPU time",
        ["rollouts", "seconds in all", "ms a program run", "ms a rollout beside it"],
        rows,
    )
    megabytes = subprocess.run(
        [sys.executable, __file__, "--memory-of-a-fit"], check=True, capture_output=True, text=True
    ).stdout.strip()
    print(f"\nA fit to {FEEDBACK_ROWS:,} rows of feedback on as many texts adds {megabytes} MB at its peak.")


class Timed(dspy.Module):
    """A program that is one decision and knows how long its runs take."""

    seconds: ClassVar[list[float]] = []  # of all copies: a compile runs one

    def __init__(self, encoder: Callable[[list[str]], np.ndarray]) -> None:
        super().__init__()
        names = [f"option {index}" for index in range(OPTIONS)]
        self.route = DifferentiableRoute("text -> option", tools=names, encoder=encoder)

    def forward(self, text: str) -> dspy.Prediction:
        """Decide."""
        started = time.thread_time()
        prediction = self.route(text=text)
        Timed.seconds.append(time.thread_time() - started)
        return dspy.Prediction(option=prediction.option)


def synthetic(count: int) -> tuple[np.ndarray, np.ndarray, Callable[[list[str]], np.ndarray]]:
    """Vectors around option centres, their options, and an encoder of the texts "0", "1", ... and of the options."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((OPTIONS, DIMENSION)).astype(np.float32)
    labels = generator.integers(OPTIONS, size=count)
    vectors = centers[labels] + 1.5 * generator.standard_normal((count, DIMENSION)).astype(np.float32)
    blurred = centers + 2.0 * generator.standard_normal(centers.shape).astype(np.float32)

    def encoder(texts: list[str]) -> np.ndarray:
        found = []
        for text in texts:
            words = text.split()
            known = words[-1].isdigit()
            number = int(words[-1]) if known else 0
            found.append(blurred[number % OPTIONS] if len(words) > 1 else vectors[number % count])
        return np.stack(found)

    return vectors, labels, encoder


def memory_of_a_fit() -> str:
    """Megabytes of resident memory that learning from many rows adds to the process at its peak."""
    _, labels, encoder = synthetic(FEEDBACK_ROWS)
    program = Timed(encoder)
    names = program.route.fields[0].option_names
    generator = np.random.default_rng(1)
    chosen = np.where(generator.random(FEEDBACK_ROWS) < 0.6, labels, generator.integers(OPTIONS, size=FEEDBACK_ROWS))
    program.route.encoder.encode([str(index) for index in range(FEEDBACK_ROWS)])
    program.route(text="0")
    fit_routes(field_rows({"self.route": program.route}, _feedback(chosen[:100], labels[:100], names)))
    process, stop, sizes = psutil.Process(), threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.002):
            sizes.append(process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    fit_routes(field_rows({"self.route": program.route}, _feedback(chosen, labels, names)))
    stop.set()
    watcher.join()
    return f"{(max(sizes) - before) / 2**20:.0f}"


def _feedback(chosen: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> list[Feedback]:
    """A row of a log for each choice."""
    return [
        Feedback("log", str(row), "self.route", "option", str(row), names, names[option], 1.0, float(option == label))
        for row, (option, label) in enumerate(zip(chosen.tolist(), labels.tolist(), strict=True))
    ]


if __name__ == "__main__":
    main()
