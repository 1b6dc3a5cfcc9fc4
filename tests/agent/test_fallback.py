import pickle

import dspy
import pytest

from dspy_router import RoutedAgent, RouteError
from dspy_router.decisions import choosing
from dspy_router.errors import AbstainError
from tests.agent.programs import (
    InOrder,
    answers,
    last_number,
    right_answer,
    search,
    tools_of,
    town_agent,
    town_requests,
)
from tests.conftest import bag_of_words

PLANNER = "question, trajectory -> next_tool_name, next_tool_args: dict"


def declining(server: object, fallback: dspy.Module | None, **settings: object) -> RoutedAgent:
    """An agent whose guard found no threshold that keeps the promise: it declines every step."""
    agent = town_agent(fallback=fallback, **settings)
    with dspy.context(lm=server.lm):
        agent.step.guard(town_requests(20), metric=lambda *_: 0.0, risk=0.5, delta=0.1, program=agent, num_threads=1)
    server.requests.clear()
    return agent


def planned(*steps: tuple[str, object]) -> object:
    """An LM that plans these steps in turn, and answers with the last number it was shown."""
    coming = iter(steps)

    def answer(prompt: str) -> str:
        if "next_tool_name" not in prompt:
            return last_number(prompt)
        name, arguments = next(coming)
        return answers(next_thought="Well.", next_tool_name=name, next_tool_args=arguments)(prompt)

    return answer


def test_a_declined_step_goes_to_the_planner_that_sees_the_trajectory(scripted_lm: object) -> None:
    server = scripted_lm(planned(("search", {"query": "Vand"}), ("finish", {})))
    agent = declining(server, dspy.Predict(f"{PLANNER}, next_thought"))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert prediction.answer == "1200"
    assert prediction.trajectory["tool_args_0"] == {"query": "Vand"}
    assert prediction.trajectory["thought_0"] == "Well."
    first, second, answer = server.requests
    assert "observation_0" not in first
    assert "[[ ## observation_0 ## ]]\nVand has 1200 inhabitants." in second
    assert "Well." not in answer


def test_a_react_predictor_serves_as_fallback(scripted_lm: object) -> None:
    react = dspy.ReAct("question -> answer", tools=[search])
    server = scripted_lm(planned(("search", {"query": "Vand"}), ("finish", {})))
    agent = declining(server, react.react)
    with dspy.context(lm=server.lm):
        assert agent(question="plain count of Ostrel").answer == "1200"
    assert "fallback" in dict(agent.named_predictors())


def test_a_whole_react_is_refused_as_fallback(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = declining(server, dspy.ReAct("question -> answer", tools=[search]))
    with dspy.context(lm=server.lm), pytest.raises(RouteError, match=r"Give its planner: react\.react"):
        agent(question="plain count of Ostrel")


def test_a_planner_may_leave_the_arguments_to_their_source(scripted_lm: object) -> None:
    server = scripted_lm(planned(("search", {}), ("finish", {})))
    agent = declining(server, dspy.Predict("question, trajectory -> next_tool_name"))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert prediction.trajectory["tool_args_0"] == {"query": "plain count of Ostrel"}


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (("search", {"town": "Vand"}), "'query' is a required property"),
        (("walk", {}), "there is no such tool; the tools are ['search', 'calculator']"),
        (("search", "to Vand"), "is no JSON object"),
    ],
)
def test_the_planner_is_asked_once_more_for_what_is_refused(scripted_lm: object, first: object, told: str) -> None:
    server = scripted_lm(planned(first, ("search", {"query": "Vand"}), ("finish", {})))
    agent = declining(server, dspy.Predict("question, trajectory -> next_tool_name, next_tool_args"))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert told in server.requests[1]
    assert prediction.trajectory["tool_args_0"] == {"query": "Vand"}


def test_what_the_planner_has_refused_twice_is_an_observation(scripted_lm: object) -> None:
    server = scripted_lm(planned(("walk", {}), ("walk", {}), ("finish", {})))
    agent = declining(server, dspy.Predict(PLANNER))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert tools_of(prediction) == ["walk", "finish"]
    assert "there is no such tool" in prediction.trajectory["observation_0"]


def test_a_planner_that_cannot_be_read_ends_the_run(scripted_lm: object) -> None:
    server = scripted_lm(lambda prompt: "nonsense" if "next_tool_name" in prompt else last_number(prompt))
    agent = declining(server, dspy.Predict(PLANNER))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert (prediction.answer, prediction.trajectory) == ("unknown", {})


def test_without_a_fallback_a_declined_step_ends_the_run(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = declining(server, None)
    with dspy.context(lm=server.lm):
        assert agent(question="plain count of Ostrel").trajectory == {}
        agent.step.on_abstain = "raise"
        with pytest.raises(AbstainError) as raised:
            agent(question="plain count of Ostrel")
    assert pickle.loads(pickle.dumps(raised.value)).decisions == raised.value.decisions


def test_refused_arguments_of_the_routes_choice_go_to_the_fallback(scripted_lm: object) -> None:
    server = scripted_lm(planned(("search", {"query": "Vand"})))
    agent = RoutedAgent(
        "question -> answer", tools=[search], fallback=dspy.Predict(PLANNER), args={"search": lambda progress: {}},
        encoder=bag_of_words,
    )  # fmt: skip
    with dspy.context(lm=server.lm), choosing(InOrder("search", "finish")):
        prediction = agent(question="plain count of Ostrel")
    assert "'query' is a required property" in server.requests[0]
    assert prediction.answer == "1200"


def test_what_the_fallback_cannot_mend_either_is_not_chosen_before_something_new(scripted_lm: object) -> None:
    server = scripted_lm(planned(("calculator", {}), ("calculator", {})))
    agent = town_agent(fallback=dspy.Predict(PLANNER), args={"calculator": lambda progress: {}})
    chosen = InOrder("calculator", "search", "calculator")
    with dspy.context(lm=server.lm), choosing(chosen):
        prediction = agent(question="plain count of Ostrel")
    assert tools_of(prediction) == ["calculator", "search", "calculator", "finish"]
    assert chosen.candidates[1:] == [["search", "finish"], ["calculator", "finish"]]


def test_a_planner_may_try_the_same_tool_again_at_the_next_step(scripted_lm: object) -> None:
    steps = [("search", {}), ("search", {}), ("calculator", {}), ("calculator", {}), ("search", {"query": "Vand"})]
    finishing = scripted_lm(answers(next_tool_name="finish", next_tool_args={}, answer="unknown"))
    agent = declining(finishing, dspy.Predict(PLANNER), args={"search": "lm", "calculator": "lm"})
    with dspy.context(lm=scripted_lm(planned(*steps, ("finish", {}))).lm):
        prediction = agent(question="plain count of Ostrel")
    assert tools_of(prediction) == ["search", "calculator", "search", "finish"]
    assert prediction.answer == "1200"


def test_guarding_the_step_on_the_agents_examples_says_to_give_the_agent(scripted_lm: object) -> None:
    with pytest.raises(
        RouteError, match=r"\['question'\], but the route takes \['state'\].*guard\(\.\.\., program=agent"
    ):
        town_agent().step.guard(town_requests(20), metric=right_answer, risk=0.5)


def test_a_planner_that_repeats_a_call_is_told_so(scripted_lm: object) -> None:
    steps = [("search", {"query": "Vand"}), ("search", {"query": "Vand"}), ("finish", {})]
    server = scripted_lm(planned(*steps))
    agent = declining(server, dspy.Predict(PLANNER))
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert tools_of(prediction) == ["search", "finish"]
    assert "it was called with the same arguments before" in server.requests[2]


def test_a_planner_without_arguments_has_refused_ones_written_again(scripted_lm: object) -> None:
    def answer(prompt: str) -> str:
        if "next_tool_args" in prompt:
            name = "query" if "Execution error" in prompt else "town"
            return answers(next_tool_args={name: "Vand"})(prompt)
        return answers(next_tool_name="finish" if "1200" in prompt else "search", answer="1200")(prompt)

    server = scripted_lm(answer)
    agent = declining(server, dspy.Predict("question, trajectory -> next_tool_name"), args={"search": "lm"})
    with dspy.context(lm=server.lm):
        prediction = agent(question="plain count of Ostrel")
    assert prediction.trajectory["tool_args_0"] == {"query": "Vand"}
