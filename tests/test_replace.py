import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, replace_predictor
from dspy_router.split import RoutedPredict
from tests.conftest import bag_of_words
from tests.programs import FRUIT, PlannedShop, fruit_requests
from tests.tutorial_programs import writes

TOOL = "text -> tool: Literal['search', 'mail']"


class Guard(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.check = dspy.Predict("text -> safe: bool")


class Agent(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.ChainOfThought(TOOL)
        self.steps = {"plan": dspy.ChainOfThought(TOOL), 7: dspy.Predict(TOOL), "it's": dspy.Predict(TOOL)}
        self.guards = [dspy.Predict("text -> safe: bool"), Guard()]
        self.pair = (dspy.Predict(TOOL), Guard())
        self.answer = dspy.Predict("text, tool -> answer")
        self.react = dspy.ReAct("question -> answer", tools=[])  # but `finish`

    def forward(self, text: str) -> dspy.Prediction:
        return self.steps["plan"](text=text)


@pytest.mark.parametrize(
    ("path", "reach"),
    [
        ("steps['plan'].predict", lambda agent: agent.steps["plan"]),
        ("steps['plan']", lambda agent: agent.steps["plan"]),
        ("steps['7']", lambda agent: agent.steps[7]),
        ("steps['it's']", lambda agent: agent.steps["it's"]),
        ("guards[0]", lambda agent: agent.guards[0]),
        ("guards[1].check", lambda agent: agent.guards[1].check),
        ("pair[0]", lambda agent: agent.pair[0]),
        ("pair[1].check", lambda agent: agent.pair[1].check),
        ("predict", lambda agent: agent.predict),
        ("predict.predict", lambda agent: agent.predict),
    ],
)
def test_predictors_are_replaced_wherever_they_are(path: str, reach: Callable[[Any], Any]) -> None:
    agent = Agent()
    before = dict(agent.named_predictors())
    assert path in before or f"{path}.predict" in before
    routed = replace_predictor(agent, path, encoder=bag_of_words)
    assert isinstance(reach(routed), DifferentiableRoute)
    assert not isinstance(reach(agent), DifferentiableRoute)
    assert isinstance(routed.pair, tuple)
    assert len(routed.named_predictors()) == len(before) - 1


def test_an_attribute_named_predict_is_not_the_program() -> None:
    class Named(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predict = dspy.Predict(TOOL)

    routed = replace_predictor(Named(), "predict", encoder=bag_of_words)
    assert isinstance(routed, Named)
    assert isinstance(routed.predict, DifferentiableRoute)


def test_the_code_downstream_does_not_change() -> None:
    routed = replace_predictor(PlannedShop(), "clerk", encoder=bag_of_words)
    assert routed(request="one banana").fruit == "banana"


class Shared(dspy.Module):
    """One planner under two names, and again in a guard that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(TOOL)
        self.again = [self.first]
        self.guard = Guard()
        self.guard.check = self.first
        self.twin = self.guard


@pytest.mark.parametrize("path", ["first", "again[0]", "guard.check", "twin.check"])
def test_a_shared_predictor_is_replaced_in_all_its_places(path: str) -> None:
    program = Shared()
    routed = replace_predictor(program, path, encoder=bag_of_words)
    assert isinstance(routed.first, DifferentiableRoute)
    assert routed.first is routed.again[0] is routed.guard.check is routed.twin.check
    assert not routed.named_predictors()
    assert isinstance(program.first, dspy.Predict)


def test_a_program_that_cannot_be_copied_whole_is_routed_too() -> None:
    program = Shared()
    program.lock = threading.Lock()
    routed = replace_predictor(program, "first", encoder=bag_of_words)
    assert not routed.named_predictors()
    assert isinstance(program.first, dspy.Predict)
    assert isinstance(program.guard.check, dspy.Predict)


def test_a_module_that_refers_to_its_parent_is_no_endless_loop() -> None:
    program = Shared()
    program.guard.parent = program
    routed = replace_predictor(program, "first", encoder=bag_of_words)
    assert routed.guard.parent is routed


def test_a_route_in_a_compiled_module_is_saved_with_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = Agent()
    program.guards[1]._compiled = True
    assert "guards[1].check" not in dict(program.named_predictors())
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        routed = replace_predictor(program, "guards[1].check", encoder=bag_of_words)
    assert "The Guard around 'guards[1].check' is no longer marked compiled" in caplog.text
    assert "guards[1].check.learned" in routed.dump_state()
    assert program.guards[1]._compiled


def test_a_compiled_program_can_be_compiled_again_once_it_is_routed(caplog: pytest.LogCaptureFixture) -> None:
    compiled = dspy.LabeledFewShot(k=2).compile(PlannedShop(), trainset=fruit_requests(6, label=True))
    compiled._compiled = True
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        routed = replace_predictor(compiled, "clerk", encoder=bag_of_words)
    assert not routed._compiled
    assert compiled._compiled
    assert "no longer marked" not in caplog.text


def test_demos_that_stay_behind_can_teach_the_route(caplog: pytest.LogCaptureFixture) -> None:
    program = dspy.LabeledFewShot(k=12).compile(PlannedShop(), trainset=fruit_requests(12, label=True))
    demos = program.clerk.demos
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        routed = replace_predictor(program, "clerk", encoder=bag_of_words)
    assert "the 12 of the predictor at 'clerk' are left out. They can teach it" in caplog.text
    assert ".with_inputs('request')" in caplog.text
    trainset = [dspy.Example(**demo).with_inputs("request") for demo in demos]
    routed.clerk = RouteFinetune().compile(routed.clerk, trainset=trainset)
    assert all(routed(request=demo.request).fruit == demo.fruit for demo in demos)


def test_a_chain_of_thought_loses_its_reasoning_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        routed = replace_predictor(Agent(), "steps['plan'].predict", encoder=bag_of_words)
    assert "gives no 'reasoning'" in caplog.text
    assert "keep_lm=['reasoning']" in caplog.text
    prediction = routed(text="search")
    assert prediction.tool == "search"
    assert "reasoning" not in prediction


@pytest.mark.parametrize("keep_lm", [True, ["reasoning"]])
def test_a_chain_of_thought_keeps_its_reasoning_on_request(
    keep_lm: object, scripted_lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = scripted_lm(writes({"reasoning": "because"}))
    routed = replace_predictor(Agent(), "steps['plan']", keep_lm=keep_lm, encoder=bag_of_words)
    assert "steps['plan'].predict" in dict(routed.named_predictors())
    with dspy.context(lm=server.lm):
        prediction = routed(text="search")
    assert (prediction.tool, prediction.reasoning) == ("search", "because")
    assert not [record for record in caplog.records if record.name.startswith("dspy_router")]


@pytest.mark.parametrize("module", [dspy.Predict, dspy.ChainOfThought])
@pytest.mark.parametrize("keep_lm", [False, ["note"]])
def test_a_program_that_is_the_planner_becomes_the_route(module: type, keep_lm: Any) -> None:
    program = module(f"{TOOL}, note: bool")
    for path in {"self", program.named_predictors()[0][0]}:
        routed = replace_predictor(program, path, keep_lm=keep_lm, encoder=bag_of_words)
        assert isinstance(routed, RoutedPredict if keep_lm else DifferentiableRoute)


def test_an_lm_is_not_kept_where_there_is_nothing_for_it() -> None:
    routed = replace_predictor(PlannedShop(), "clerk", keep_lm=True, encoder=bag_of_words)
    assert isinstance(routed.clerk, DifferentiableRoute)


@pytest.mark.parametrize(
    ("path", "keep_lm", "message"),
    [
        ("answer", False, "'answer' cannot be replaced by a route: Output field 'answer' is a plain str.*None of its"),
        ("planner", False, r"no predictor at 'planner'; its predictors are \['predict.predict', \"steps\['plan'\]"),
        ("react.react", False, r"Output field 'next_thought' is a plain str.*keep_lm=\['next_thought', 'next_tool_"),
        ("react.react", ["next_thought"], r"has one option, 'finish'.*keep_lm=\['next_thought', 'next_tool_args'\]\."),
        (
            "react.react",
            True,
            r"'react.react' cannot .* 'next_tool_name' has one option, 'finish'.*Give at least two\.$",
        ),
        ("react", False, r"'react' names the module ReAct, .*\['react.react', 'react.extract.predict'\]"),
        ("self", False, "'self' names the module Agent, not a predictor. Name one of those in it: "),
        ("predict", "reasoning", r"keep_lm='reasoning' is one string; give a list of output fields: \['reasoning'\]"),
        ("predict", ["thought"], r"names \['thought'\]; the outputs .* at 'predict' are \['reasoning', 'tool'\]"),
        ("guards[0]", ["safe"], r"keep_lm leaves \['safe'\] to the LM, and so nothing to decide"),
    ],
)
def test_what_cannot_be_replaced_is_said(path: str, keep_lm: Any, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        replace_predictor(Agent(), path, keep_lm=keep_lm, encoder=bag_of_words)


def test_one_tool_for_a_plain_str_is_not_taken_for_free_text() -> None:
    with pytest.raises(RouteError, match=r"one option, 'search'.*Give at least two\.$"):
        replace_predictor(dspy.Predict("text -> tool"), "self", ["search"], encoder=bag_of_words)


def test_several_outputs_that_could_be_tools_are_named() -> None:
    planner = dspy.Predict("text -> tool: str, query: str, note: bool")
    with pytest.raises(RouteError, match=r"\['tool', 'query'\] are all plain str.* keep_lm=\['query'\], say\.$"):
        replace_predictor(planner, "self", ["search", "mail"], encoder=bag_of_words)
    routed = replace_predictor(planner, "self", ["search", "mail"], keep_lm=["query"], encoder=bag_of_words)
    assert [field.name for field in routed.route.fields] == ["tool", "note"]


def test_tools_describe_the_planners_options() -> None:
    routed = replace_predictor(
        PlannedShop(), "clerk", tools={"apple": "for pie and cider", "banana": "to split", "cherry": "with a stone"},
        encoder=bag_of_words,
    )  # fmt: skip
    assert routed(request="some cider").fruit == "apple"
    assert list(routed.clerk.fields[0].option_names) == FRUIT
