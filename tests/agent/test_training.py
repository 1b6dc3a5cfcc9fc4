import re

import dspy
import pytest

from dspy_router import RouteError, RouteFinetune
from dspy_router.agent.imitation import imitation_rows, react_episode
from dspy_router.decisions import choosing
from tests.agent.programs import (
    InOrder,
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
        optimizer = RouteFinetune(metric=metric, max_metric_calls=120, num_threads=2, metric_noise=0.0)
        trained = optimizer.compile(agent, trainset=town_requests(24))
    assert before <= 0.5
    assert rightly_planned(trained, server, test) >= 0.9
    assert rightly_planned(agent, server, test) == before
    assert {row.occurrence for row in optimizer.feedback} >= {0, 1, 2}
    assert any(len(row.candidates) == 2 for row in optimizer.feedback)


def test_a_react_teaches_an_agent_its_steps(scripted_lm: object) -> None:
    def planner(prompt: str) -> str:
        question = prompt.split("[[ ## question ## ]]\n")[1].splitlines()[0]
        if "next_tool_name" not in prompt:
            return answers(reasoning="It says so.", answer="480")(prompt)
        done = prompt.count("## observation_")
        name = (["search", "calculator", "finish"] if "double" in question else ["search", "finish"])[done]
        [people] = re.findall(r"has (\d+) inhabitants", prompt) or ["0"]
        arguments = {"search": {"query": question}, "calculator": {"expression": f"{people} * 2"}, "finish": {}}[name]
        return answers(next_thought="Well.", next_tool_name=name, next_tool_args=arguments)(prompt)

    server = scripted_lm(planner)
    react = dspy.ReAct("question -> answer", tools=[search, calculator], max_iters=4)
    optimizer = RouteFinetune()
    with dspy.context(lm=server.lm):
        trained = optimizer.compile(town_agent(), trainset=town_requests(20), teacher=react)
    assert optimizer.report is not None
    assert optimizer.report.rows == {"teacher": 50}
    assert rightly_planned(trained, server, town_requests(20, seed=1)) >= 0.9


def test_rows_of_recorded_runs_teach_an_agent(scripted_lm: object) -> None:
    server, agent, episodes = scripted_lm(last_number), town_agent(), []
    for number, example in enumerate(town_requests(20)):
        with dspy.context(lm=server.lm), choosing(InOrder(*example.tools, "finish")):
            recorded = agent(**example.inputs())
        episodes.append(react_episode(agent.signature, example.inputs(), recorded, task=f"{number}", reward=1.0))
    rows = imitation_rows(episodes, candidates=["search", "calculator", "finish"])
    trained = RouteFinetune().compile(agent, feedback=rows)
    assert rightly_planned(trained, server, town_requests(20, seed=1)) >= 0.9

    new = [
        example.copy(question=f"{example.question} {number}")
        for number, example in enumerate(town_requests(40, seed=2))
    ]
    with dspy.context(lm=server.lm):
        trained.step.guard(new, metric=right_answer, risk=0.3, delta=0.1, program=trained)
        kept = [trained(question=example.question) for example in new]
    assert trained.step.promise is not None
    assert trained.step.promise.threshold is not None
    assert sum("tool_name_0" in prediction.trajectory for prediction in kept) >= 30


def test_a_react_with_asynchronous_tools_is_no_teacher(scripted_lm: object) -> None:
    async def lookup(query: str) -> str:
        "Look it up."
        return query

    server = scripted_lm(last_number)
    react = dspy.ReAct("question -> answer", tools=[lookup, calculator])
    with (
        dspy.context(lm=server.lm),
        pytest.raises(RouteError, match=r"\['lookup'\] are asynchronous: record runs with await teacher.acall"),
    ):
        RouteFinetune().compile(town_agent(), trainset=town_requests(2), teacher=react)
    assert not server.requests
