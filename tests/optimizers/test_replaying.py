from itertools import product

import dspy
import numpy as np
import pytest

from dspy_router import RouteFinetune
from dspy_router.feedback import Feedback
from dspy_router.optimizers.learner import field_rows
from dspy_router.optimizers.outcomes import RewardReading
from dspy_router.optimizers.replaying import Replay, replay
from tests.agent.programs import tools_of, town_agent, town_requests
from tests.programs import FRUIT, fruit_route


class Unsaid(dspy.Module):
    """In place of an LM that answers."""

    def __init__(self, signature: type[dspy.Signature]) -> None:
        super().__init__()

    def forward(self, **inputs: object) -> dspy.Prediction:
        return dspy.Prediction(answer="")


def graded(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    """A little for each step that is right from the first on, most for a plan that is right as a whole."""
    took, wanted = tools_of(prediction), [*example.tools, "finish"]
    wrong = [step for step, (one, other) in enumerate(zip(took, wanted, strict=False)) if one != other]
    return 0.2 * (wrong or [len(wanted)])[0] / len(wanted) + 0.8 * (took == wanted)


def rightly_planned(agent: dspy.Module, examples: list[dspy.Example]) -> float:
    return float(
        np.mean([tools_of(agent(question=example.question)) == [*example.tools, "finish"] for example in examples])
    )


def compiled(agent: dspy.Module, calls: int, trainset: list[dspy.Example]) -> tuple[dspy.Module, RouteFinetune]:
    optimizer = RouteFinetune(graded, max_metric_calls=calls, num_threads=1)
    return optimizer.compile(agent, trainset=trainset), optimizer


@pytest.fixture(scope="module")
def learned() -> tuple[dspy.Module, RouteFinetune]:
    """An agent that learned from a graded metric alone, and how."""
    return compiled(town_agent(answer=Unsaid), 60, town_requests(20))


def test_a_graded_metric_teaches_an_agent_and_does_not_make_it_worse_again(
    learned: tuple[dspy.Module, RouteFinetune],
) -> None:
    test = town_requests(40, seed=100)
    before = rightly_planned(learned[0], test)
    assert before >= 0.4  # of none
    again, optimizer = compiled(learned[0], 24, town_requests(12, seed=11))
    assert rightly_planned(again, test) >= before
    assert optimizer.report.rollouts <= 24


def test_a_run_an_example_shows_no_gain(learned: tuple[dspy.Module, RouteFinetune]) -> None:
    _, optimizer = compiled(learned[0], 8, town_requests(20, seed=10))
    assert optimizer.report.kept == "student"
    assert "runs made, decided by heads that did not see them" in optimizer.report.reason


def test_choices_of_a_graded_run_are_tried_one_at_a_time(learned: tuple[dspy.Module, RouteFinetune]) -> None:
    feedback = learned[1].feedback
    assert {row.propensity for row in feedback} == {1.0}
    runs = {row.run: (row.example, *(other.chosen for other in feedback if other.run == row.run)) for row in feedback}
    assert len(runs) == 60
    assert len(set(runs.values())) >= 57  # but for those repeated to measure the metric's noise


def run(example: str, text: str, fruits: tuple[str, str], reward: float) -> list[Feedback]:
    """A run that decides for a fruit twice."""
    name = f"{example} {fruits}"
    return [
        Feedback("rollout", example, "self", "fruit", f"{text} {step}", tuple(FRUIT), fruit, 1.0, reward,
                 occurrence=step, sole=False, run=name)
        for step, fruit in enumerate(fruits)
    ]  # fmt: skip


def replayed(rows: list[Feedback]) -> Replay | None:
    routes = {"self": fruit_route()}
    return replay(routes, field_rows(routes, rows), rows, RewardReading())


def test_what_is_learned_from_other_examples_is_followed_down_an_examples_runs() -> None:
    words = ["pie", "split", "tart"]  # of which no description speaks
    rows = []
    for number in range(18):
        wanted = FRUIT[number % 3]
        for chosen in product(FRUIT, FRUIT):
            reward = 0.1 + 0.4 * sum(fruit == wanted for fruit in chosen)
            rows += run(f"{number}", words[number % 3], chosen, reward)
    found = replayed(rows)
    assert found.student < 0.6
    assert found.trained > 0.8
    assert 0 < found.error < 0.1


def test_what_no_run_took_counts_against_the_trained_heads_alone() -> None:
    rows = [row for number in range(12) for row in run(f"{number}", FRUIT[0], (FRUIT[0], FRUIT[0]), number % 2 / 2)]
    found = replayed(rows)
    assert found.trained <= found.student == pytest.approx(0.25)


def test_there_is_nothing_to_replay_but_graded_rollouts_of_several_decisions() -> None:
    rows = [row for number in range(4) for row in run(f"{number}", FRUIT[0], (FRUIT[0], FRUIT[1]), number / 4)]
    assert replayed(rows) is not None
    assert replayed(rows[:2]) is None  # one example
    assert replayed([*rows, Feedback("label", "a", "self", "fruit", "a", tuple(FRUIT), FRUIT[0], None, 1.0)]) is None
    assert replayed([row for row in rows if row.reward == 0] * 2) is None
