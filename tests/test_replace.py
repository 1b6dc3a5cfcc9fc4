import logging

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, replace_predictor
from tests.conftest import bag_of_words
from tests.programs import PlannedShop


class Agent(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = {"plan": dspy.ChainOfThought("text -> tool: Literal['search', 'mail']")}
        self.guards = [dspy.Predict("text -> safe: bool")]
        self.answer = dspy.Predict("text, tool -> answer")
        self.react = dspy.ReAct("question -> answer", tools=[])

    def forward(self, text: str) -> dspy.Prediction:
        return self.steps["plan"](text=text)


@pytest.mark.parametrize(
    ("path", "reach"),
    [
        ("steps['plan'].predict", lambda agent: agent.steps["plan"]),
        ("steps['plan']", lambda agent: agent.steps["plan"]),
        ("guards[0]", lambda agent: agent.guards[0]),
    ],
)
def test_predictors_are_replaced_wherever_they_are(path: str, reach: object) -> None:
    agent = Agent()
    routed = replace_predictor(agent, path, encoder=bag_of_words)
    assert isinstance(reach(routed), DifferentiableRoute)
    assert not isinstance(reach(agent), DifferentiableRoute)
    assert "answer" in dict(routed.named_predictors())


def test_the_code_downstream_does_not_change() -> None:
    routed = replace_predictor(PlannedShop(), "clerk", encoder=bag_of_words)
    assert routed(request="one banana").fruit == "banana"


def test_a_chain_of_thought_loses_its_reasoning_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        routed = replace_predictor(Agent(), "steps['plan'].predict", encoder=bag_of_words)
    assert "gives no 'reasoning'" in caplog.text
    prediction = routed(text="search")
    assert prediction.tool == "search"
    assert "reasoning" not in prediction


@pytest.mark.parametrize("module", [dspy.Predict, dspy.ChainOfThought])
def test_a_program_that_is_the_planner_becomes_the_route(module: type) -> None:
    program = module("text -> tool: Literal['search', 'mail']")
    path = program.named_predictors()[0][0]
    assert isinstance(replace_predictor(program, path, encoder=bag_of_words), DifferentiableRoute)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("answer", "'answer' cannot be replaced by a route: Output field 'answer' is a plain str.*split the signature"),
        ("planner", r"no predictor at 'planner'; its predictors are \[\"steps\['plan'\].predict\""),
        ("react.react", "'react.react' cannot be replaced by a route: Output field 'next_thought' is a plain str"),
        ("react", "no predictor at 'react'.*plans inside itself"),
    ],
)
def test_what_cannot_be_replaced_is_said(path: str, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        replace_predictor(Agent(), path, encoder=bag_of_words)


def test_tools_describe_the_planners_options() -> None:
    routed = replace_predictor(
        PlannedShop(), "clerk", tools={"apple": "for pie and cider", "banana": "to split", "cherry": "with a stone"},
        encoder=bag_of_words,
    )  # fmt: skip
    assert routed(request="some cider").fruit == "apple"
