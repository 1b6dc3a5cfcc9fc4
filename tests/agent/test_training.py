import dspy
import pytest

from dspy_router import RoutedAgent, RouteFinetune
from tests.agent.programs import (
    answers,
    calculator,
    last_number,
    right_answer,
    search,
    tools_of,
    town_agent,
    town_requests,
)


def rightly_planned(program: dspy.Module, server: object, examples: list[dspy.Example]) -> float:
    """Share of examples for which exactly the tools that are needed were called."""
    with dspy.context(lm=server.lm):
        found = [tools_of(program(**example.inputs())) for example in examples]
    right = [tools == [*example.tools, "finish"] for tools, example in zip(found, examples, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["0/1 rewards", "graded rewards"])
def test_an_agent_learns_from_the_metric_alone(scripted_lm: object, share: float) -> None:
    server = scripted_lm(last_number)

    def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
        wasted = len(tools_of(prediction)) - 1 - len(example.tools)
        return float(right_answer(example, prediction)) * (1.0 if not wasted else 1 - share)

    agent, test = town_agent(), town_requests(20, seed=1)
    before = rightly_planned(agent, server, test)
    with dspy.context(lm=server.lm):
        optimizer = RouteFinetune(metric=metric, max_metric_calls=240, num_threads=2, metric_noise=0.0)
        trained = optimizer.compile(agent, trainset=town_requests(40))
    assert before <= 0.5
    assert rightly_planned(trained, server, test) >= 0.9
    assert rightly_planned(agent, server, test) == before
    assert {row.occurrence for row in optimizer.feedback} >= {0, 1, 2}
    assert any(len(row.candidates) == 2 for row in optimizer.feedback)
