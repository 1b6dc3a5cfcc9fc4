"""What to do next in tau-bench's airline dialogues: reply to the user, or which of 14 tools to call.

    python benchmarks/tau_bench.py [--choose]

200 recorded runs of a gpt-4o agent on 50 tasks (Yao et al. 2024). A decision is right if it is what the agent did next.
Five folds by task, so that no task is in training and test; every method sees the same folds. Intervals of 95 % are
from a bootstrap over tasks, those of differences paired. Coverage is in hindsight: the most steps that can be kept, by
the route's own confidence, at this share of wrong ones. The first table's routes are compiled; the comparisons of
weights and blocks fit the head alone, which decides as well and leaves confidence uncalibrated.

`--choose` shows how the encoder's weights and turns were chosen: in each fold, on three inner folds by task of its
training runs. Which blocks there are was found on the same 50 tasks, so there is some optimism in that.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from common import DATA, VECTORS, print_table
from scipy.sparse import spmatrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.agent.dialogues import REPLY, read_dialogues
from dspy_router.agent.imitation import Episode, Step, imitation_rows
from dspy_router.agent.state import StepState
from dspy_router.encoders.base import Encoder
from dspy_router.encoders.step import WEIGHTS, StepEncoder
from dspy_router.evaluation.reliability import risk_coverage
from dspy_router.feedback import Feedback
from dspy_router.optimizers.learner import field_rows, fit_routes

TOOLS = {
    REPLY: "Answer the user, ask for what is missing, or ask to confirm.",
    "book_reservation": "Book flights for passengers, with baggage, insurance and payment.",
    "calculate": "Work out a sum, such as a total price or a refund.",
    "cancel_reservation": "Cancel a whole reservation.",
    "get_reservation_details": "Look up a reservation by its reservation ID.",
    "get_user_details": "Look up a user's profile by the user ID: payment methods, membership, reservations.",
    "list_all_airports": "List all airports with their cities.",
    "search_direct_flight": "Find direct flights between two airports on a date.",
    "search_onestop_flight": "Find flights with one stop between two airports on a date.",
    "send_certificate": "Send the user a certificate as compensation.",
    "think": "Reason about rules or a difficult case before going on.",
    "transfer_to_human_agents": "Hand over to a human agent what cannot be done here.",
    "update_reservation_baggages": "Add checked bags to a reservation.",
    "update_reservation_flights": "Change a reservation's flights or cabin.",
    "update_reservation_passengers": "Change the passengers of a reservation.",
}
NAMES = list(TOOLS)
TURNS = 3
FOLDS, INNER_FOLDS, DRAWS = 5, 3, 5_000
STATE, TEXT = "route, state", "route, text alone"
NUMBERS = ("calls", "last", "step", "failed")  # the blocks that hold no vector
SETTINGS = {
    "as it is": {"turns": TURNS},
    "two turns": {"turns": 2},
    "no turns": {"turns": 0},
    "turns at 0.35": {"turns": TURNS, "weights": {"messages": 0.35}},
    "turns at 0.7": {"turns": TURNS, "weights": {"messages": 0.7}},
    "turns at 1": {"turns": TURNS, "weights": {"messages": 1.0}},
    "numbers at 0.25": {"turns": TURNS, "weights": dict.fromkeys(NUMBERS, 0.25)},
    "numbers at 1": {"turns": TURNS, "weights": dict.fromkeys(NUMBERS, 1.0)},
}


@dataclass(frozen=True)
class Table:
    """All steps in columns: the step, its task, whether its run succeeded, and the fold in which it is tested."""

    steps: list[Step]
    tasks: np.ndarray
    succeeded: np.ndarray
    folds: np.ndarray

    @property
    def chosen(self) -> np.ndarray:
        """What the agent did."""
        return np.array([step.chosen for step in self.steps])


@dataclass(frozen=True)
class Answers:
    """What a method chose at every step, each from a fit that had not seen its task, and how sure it was."""

    chosen: np.ndarray
    confidence: np.ndarray


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="show how the encoder's settings were chosen instead")
    choose = parser.parse_args().choose
    episodes = read_dialogues(DATA / "tau_bench" / "airline.jsonl.gz", turns=TURNS)
    table = columns(episodes)
    base = SentenceEncoder(cache_size=20_000, vector_cache=VECTORS)
    encode_parts(base, table)
    if choose:
        print_table(
            "Mean over folds, % of the training steps of each, by three inner folds: all / that call a tool",
            ("setting", "all", "tools", "mean"),
            choice(episodes, base),
        )
        return
    report(episodes, table, base)


def columns(episodes: Sequence[Episode], folds: int = FOLDS) -> Table:
    """The steps of all episodes, in order, and so many folds of their tasks."""
    pairs = [(episode, step) for episode in episodes for step in episode.steps]
    tasks = np.array([episode.task for episode, _ in pairs])
    fold = np.zeros(len(pairs), int)
    for number, (_, test) in enumerate(GroupKFold(folds).split(pairs, groups=tasks)):
        fold[test] = number
    return Table([step for _, step in pairs], tasks, np.array([episode.reward == 1 for episode, _ in pairs]), fold)


def encode_parts(base: Encoder, table: Table) -> None:
    """Put the vectors of all that was said, called and found into the encoder's cache."""
    states = [step.state for step in table.steps]
    texts = [text for state in states for text in (state.request, state.observation, *state.messages)]
    base.encode(texts, progress=lambda batches: tqdm(batches, desc="encoding", unit="batch"))


def report(episodes: Sequence[Episode], table: Table, base: Encoder) -> None:
    """The methods, what the state brings, the weighting by reward, and the blocks."""
    found = baselines(table, base)
    found[TEXT] = routed(episodes, table, base, train=compiled, read=last_text)
    started = time.perf_counter()
    found[STATE] = routed(episodes, table, StepEncoder(base, NAMES[1:], turns=TURNS), train=compiled)
    seconds = (time.perf_counter() - started) / FOLDS
    print_table(
        f"Right next action, % of {len(table.steps):,} steps, {np.sum(table.chosen != REPLY):,} of which call a tool "
        f"[95 % interval]; one fit of the route with state took {seconds:.1f} s",
        ("method", "all steps", "bar", "steps that call a tool", "bar", "coverage at 10 % risk", "at 20 % risk"),
        [
            [name, share(table, answers), ">= 66" if name == STATE else "", share(table, answers, tools_only=True),
             ">= 46" if name == STATE else "", *coverage(table, answers)]
            for name, answers in found.items()
        ],
    )  # fmt: skip
    print_table(
        f"{STATE}, less another method, in points [paired 95 % interval]",
        ("other", "all steps", "steps that call a tool"),
        [[name, *differences(table, found[STATE], answers)] for name, answers in found.items() if name != STATE],
    )
    encoder = StepEncoder(base, NAMES[1:], turns=TURNS)
    weighted = {failed: routed(episodes, table, encoder, train=fitted, failed=failed) for failed in (1.0, 0.5, 0.0)}
    whole = weighted[1.0]
    print_table(
        "Steps weighted by their run's reward: what a step of a failed run counts, against 1 for one of a success",
        ("counts", "all steps", "steps that call a tool", "steps of successful runs", "of them, that call a tool"),
        [
            [f"{failed:g}", *(share(table, answers, tools_only=tools, successes_only=successes)
             for successes in (False, True) for tools in (False, True))]
            for failed, answers in weighted.items()
        ],
    )  # fmt: skip
    left_out = [*((block,) for block in WEIGHTS), NUMBERS]
    print_table(
        "Without blocks, less with all, in points [paired 95 % interval]",
        ("without", "all steps", "steps that call a tool"),
        [
            [
                ", ".join(blocks),
                *differences(table, routed(episodes, table, without(base, blocks), train=fitted), whole),
            ]
            for blocks in left_out
        ],
    )


def without(base: Encoder, blocks: Sequence[str]) -> StepEncoder:
    """The encoder of states, but for some blocks."""
    return StepEncoder(base, NAMES[1:], turns=TURNS, without=blocks)


def routed(
    episodes: Sequence[Episode],
    table: Table,
    encoder: Encoder,
    *,
    train: Callable[[DifferentiableRoute, list[Feedback]], DifferentiableRoute],
    read: Callable[[StepState], str] = StepState.to_text,
    failed: float = 1.0,
) -> Answers:
    """A route trained on the other folds' runs, of which those that failed count so much."""
    answers = nothing(table)
    untrained = DifferentiableRoute("state -> next_tool", tools=TOOLS, encoder=encoder)
    for fold in tqdm(np.unique(table.folds), desc="folds", leave=False):
        test = table.folds == fold
        tasks = set(table.tasks[test])
        seen = [episode for episode in episodes if episode.task not in tasks]
        rows = imitation_rows(seen, candidates=NAMES, route="self", failed=failed)
        decided = train(untrained, [as_read(row, read) for row in rows]).batch(
            [{"state": read(step.state)} for step in part(table.steps, test)]
        )
        answers.chosen[test] = [prediction.next_tool for prediction in decided]
        answers.confidence[test] = [prediction.confidence for prediction in decided]
    return answers


def as_read(row: Feedback, read: Callable[[StepState], str]) -> Feedback:
    """The row with what is read of its state."""
    state = StepState.from_text(row.text)
    assert state is not None
    return replace(row, text=read(state))


def compiled(route: DifferentiableRoute, rows: list[Feedback]) -> DifferentiableRoute:
    """A route that imitates the runs."""
    return RouteFinetune().compile(route, feedback=rows)


def fitted(route: DifferentiableRoute, rows: list[Feedback]) -> DifferentiableRoute:
    """The fit of `RouteFinetune` alone, without what follows it: calibration, and the record of what was seen."""
    route = route.deepcopy()
    fit_routes(field_rows({"self": route}, rows))
    return route


def last_text(state: StepState) -> str:
    """What was said or found last."""
    return state.request or state.observation


def baselines(table: Table, base: Encoder) -> dict[str, Answers]:
    """What can be had without a route."""
    states = [step.state for step in table.steps]
    documents = [" ".join((*state.messages, state.request, state.observation)) for state in states]
    return {
        "majority": most_common(table, [""] * len(states)),
        "last-tool bigram": most_common(table, [state.calls[-1] if state.follows_call else "" for state in states]),
        "TF-IDF of the last four turns, log. regression": regression(table, lambda seen: tfidf(documents, seen)),
        "user, observation, history and state, log. regression": regression(table, lambda seen: embedded(states, base)),
    }


def most_common(table: Table, given: Sequence[str]) -> Answers:
    """What was chosen most in training where the same was given; confidence is how often."""
    answers, chosen, keys = nothing(table), table.chosen, np.array(given)
    for fold in range(FOLDS):
        train = table.folds != fold
        overall = Counter(chosen[train].tolist())
        for key in set(given):
            here = (table.folds == fold) & (keys == key)
            counts = Counter(chosen[train & (keys == key)].tolist()) or overall
            name, count = counts.most_common(1)[0]
            answers.chosen[here], answers.confidence[here] = name, count / counts.total()
    return answers


def regression(table: Table, features: Callable[[np.ndarray], "np.ndarray | spmatrix"]) -> Answers:
    """Logistic regression on features, which may learn from the steps that are seen (bool [n])."""
    answers = nothing(table)
    for fold in range(FOLDS):
        seen = table.folds != fold
        given = features(seen)
        model = LogisticRegression(C=10, max_iter=300).fit(given[seen], table.chosen[seen])
        probabilities = model.predict_proba(given[~seen])
        answers.chosen[~seen] = model.classes_[probabilities.argmax(axis=1)]
        answers.confidence[~seen] = probabilities.max(axis=1)
    return answers


def tfidf(documents: Sequence[str], seen: np.ndarray) -> spmatrix:
    """Counts of words and pairs of them, weighed by what is seen."""
    counts = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    return counts.fit(part(documents, seen)).transform(documents)


def embedded(states: Sequence[StepState], base: Encoder) -> np.ndarray:
    """Vectors of what the user said, of the result, the mean one of earlier turns; which tools were called."""
    turns = np.mean([base.encode([(*[""] * TURNS, *state.messages)[-1 - turn] for state in states])
                     for turn in range(TURNS)], axis=0)  # fmt: skip
    numbers = [
        [np.log1p(state.calls.count(tool)) for tool in NAMES[1:]]
        + [float(state.follows_call and state.calls[-1] == tool) for tool in NAMES[1:]]
        + [float(state.follows_call), float(state.failed), np.log1p(state.step)]
        for state in states
    ]
    user = base.encode([state.request for state in states])
    return np.concatenate([user, base.encode([state.observation for state in states]), turns, numbers], axis=1)


def share(table: Table, answers: Answers, *, tools_only: bool = False, successes_only: bool = False) -> str:
    """Share of the steps that is right, with its interval."""
    counted = (table.chosen != REPLY) | (not tools_only)
    counted &= table.succeeded | (not successes_only)
    right = answers.chosen == table.chosen
    low, high = np.percentile(100 * means(table, right, counted), [2.5, 97.5])
    return f"{100 * right[counted].mean():.1f} [{low:.1f}, {high:.1f}]"


def differences(table: Table, answers: Answers, others: Answers) -> list[str]:
    """How many points more are right, of all steps and of those that call a tool."""
    gain = (answers.chosen == table.chosen).astype(float) - (others.chosen == table.chosen)
    cells = []
    for counted in (np.ones(len(gain), bool), table.chosen != REPLY):
        low, high = np.percentile(100 * means(table, gain, counted), [2.5, 97.5])
        cells.append(f"{100 * gain[counted].mean():+.1f} [{low:+.1f}, {high:+.1f}]")
    return cells


def means(table: Table, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Means over the counted steps in draws of as many tasks, with replacement: float [draws]."""
    _, task = np.unique(table.tasks, return_inverse=True)
    sums, counts = np.bincount(task, values * counted), np.bincount(task, counted)
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    totals: np.ndarray = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return totals


def coverage(table: Table, answers: Answers) -> list[str]:
    """Share of the steps that can be kept at a risk of 10 % and 20 %."""
    curve = risk_coverage(answers.confidence, answers.chosen != table.chosen)
    return [f"{100 * curve.coverage_at(risk):.0f} %" for risk in (0.1, 0.2)]


def choice(episodes: Sequence[Episode], base: Encoder) -> list[list[str]]:
    """Every setting on the inner folds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    outer = columns(episodes)
    for fold in tqdm(range(FOLDS), desc="outer folds"):
        tasks = set(outer.tasks[outer.folds != fold])
        seen = [episode for episode in episodes if episode.task in tasks]
        inner = columns(seen, INNER_FOLDS)
        for name, settings in SETTINGS.items():
            answers = routed(seen, inner, StepEncoder(base, NAMES[1:], **settings), train=fitted)
            right, tools = answers.chosen == inner.chosen, inner.chosen != REPLY
            found[name].append((right.mean(), right[tools].mean()))
    lines = []
    for name, shares in found.items():
        every, tools = 100 * np.mean(shares, axis=0)
        lines.append([name, f"{every:.1f}", f"{tools:.1f}", f"{(every + tools) / 2:.1f}"])
    return lines


def nothing(table: Table) -> Answers:
    """Answers to be filled in."""
    return Answers(np.empty(len(table.steps), object), np.zeros(len(table.steps)))


def part(entries: Sequence[object], mask: np.ndarray) -> list[object]:
    """The entries where a mask is true."""
    return [entry for entry, kept in zip(entries, mask, strict=True) if kept]


if __name__ == "__main__":
    main()
