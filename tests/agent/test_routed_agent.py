import asyncio
import json
import pickle
from pathlib import Path

import dspy
import pytest

from dspy_router import RoutedAgent, RouteError, record_decisions
from dspy_router.agent import AgentError, StepState
from dspy_router.decisions import choosing
from tests.agent.programs import InOrder, answers, doubled, last_number, search, tools_of, town_agent
from tests.conftest import bag_of_words

QUESTION = "plain count of Ostrel"


def test_one_lm_call_answers_from_the_request_and_the_results(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = town_agent()
    with dspy.context(lm=server.lm, trace=[]), choosing(InOrder("search", "calculator", "finish")):
        prediction = agent(question=QUESTION)
        [(predictor, inputs, _)] = dspy.settings.trace
    assert prediction.answer == "960"
    assert prediction.trajectory == {
        "tool_name_0": "search",
        "tool_args_0": {"query": QUESTION},
        "observation_0": "Ostrel has 480 inhabitants.",
        "tool_name_1": "calculator",
        "tool_args_1": {"expression": "480 * 2"},
        "observation_1": "960",
        "tool_name_2": "finish",
        "tool_args_2": {},
        "observation_2": "Completed.",
    }
    assert predictor is agent.answer
    assert inputs == {
        "question": QUESTION,
        "results": 'search(): Ostrel has 480 inhabitants.\ncalculator(expression="480 * 2"): 960',
    }
    assert len(server.requests) == 1


def test_async_runs_are_the_same(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = town_agent()
    with dspy.context(lm=server.lm):
        with choosing(InOrder("search", "calculator", "finish")):
            called = agent(question=QUESTION)
        with choosing(InOrder("search", "calculator", "finish")):
            waited = asyncio.run(agent.acall(question=QUESTION))
    assert waited.toDict() == called.toDict()


def test_the_route_reads_the_state_of_the_run(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    with dspy.context(lm=server.lm), record_decisions() as decisions, choosing(InOrder("search", "finish")):
        town_agent()(question=QUESTION)
    assert [StepState.from_text(decision.text) for decision in decisions] == [
        StepState(QUESTION),
        StepState(QUESTION, "Ostrel has 480 inhabitants.", ("search",)),
    ]


def test_an_agents_tools_are_fixed() -> None:
    agent = town_agent()
    with pytest.raises(RouteError, match=r"The tools of an agent are fixed.*Make a RoutedAgent"):
        agent.step.add_tools({"map": "Where places are."})
    with pytest.raises(RouteError, match=r"The tools of an agent are fixed"):
        agent.step.remove_tools(["search"])


def test_nothing_is_called_twice_with_the_same_arguments(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    chosen = InOrder("search", "calculator", "calculator", "finish")
    with dspy.context(lm=server.lm), choosing(chosen):
        prediction = town_agent()(question=QUESTION)
    # The calculator's argument is none before the search, and another one after each sum.
    assert chosen.candidates == [["search", "finish"], *[["calculator", "finish"]] * 3]
    assert prediction.trajectory["tool_args_2"] == {"expression": "960 * 2"}


def test_a_run_with_nothing_left_to_call_finishes_undecided(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = RoutedAgent("question -> answer", tools=[search], encoder=bag_of_words)
    with dspy.context(lm=server.lm), record_decisions() as decisions, choosing(InOrder("search")):
        prediction = agent(question=QUESTION)
    assert tools_of(prediction) == ["search", "finish"]
    assert len(decisions) == 1


def test_a_run_ends_after_max_iters_with_an_answer(scripted_lm: object) -> None:
    server = scripted_lm(last_number)
    agent = town_agent(max_iters=1)
    with dspy.context(lm=server.lm):
        with choosing(InOrder("search")):
            assert tools_of(agent(question=QUESTION)) == ["search"]
        with choosing(InOrder("search", "calculator")):
            assert agent(question=QUESTION, max_iters=2).answer == "960"
        assert tools_of(agent(question=QUESTION, max_iters=0)) == []
    assert "No tool was called." in server.requests[-1]


def test_several_inputs_and_typed_outputs_and_another_answerer(scripted_lm: object) -> None:
    server = scripted_lm(answers(reasoning="easy", count="480", note="done"))
    agent = RoutedAgent(
        "town: str, unit: str -> count: int, note", tools=[search], args={"search": "town"}, encoder=bag_of_words,
        answer=dspy.ChainOfThought,
    )  # fmt: skip
    with dspy.context(lm=server.lm), record_decisions() as decisions, choosing(InOrder("search")):
        prediction = agent(town="Ostrel", unit="people")
    assert (prediction.count, prediction.note, prediction.reasoning) == (480, "done", "easy")
    assert prediction.trajectory["tool_args_0"] == {"query": "Ostrel"}
    state = StepState.from_text(decisions[0].text)
    assert state is not None
    assert state.request == "town: Ostrel\nunit: people"


def test_the_trajectory_is_kept_when_the_lm_is_down() -> None:
    down = dspy.LM("openai/none", api_base="http://127.0.0.1:9/v1", api_key="none", num_retries=0, cache=False)
    with dspy.context(lm=down), choosing(InOrder("search", "finish")), pytest.raises(AgentError) as raised:
        town_agent()(question=QUESTION)
    assert raised.value.trajectory["observation_0"] == "Ostrel has 480 inhabitants."
    assert isinstance(raised.value.__cause__, dspy.LMError)
    assert "after 1 results" in str(raised.value)
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (str(sent), sent.trajectory) == (str(raised.value), raised.value.trajectory)


def test_saving_loading_and_copying(tmp_path: Path, scripted_lm: object) -> None:
    agent = town_agent(fallback=dspy.Predict("question, trajectory -> next_tool_name, next_tool_args: dict"))
    agent.answer.demos = [dspy.Example(question="a", results="b", answer="c")]
    agent._compiled = True
    agent.save(tmp_path / "agent.json")
    loaded = town_agent(fallback=dspy.Predict("question, trajectory -> next_tool_name, next_tool_args: dict"))
    loaded.load(tmp_path / "agent.json")
    assert json.dumps(loaded.dump_state()) == json.dumps(agent.dump_state())
    assert {"step.learned", "answer", "fallback"} <= set(agent.dump_state())
    copied = agent.deepcopy()
    assert copied.step.encoder is agent.step.encoder
    assert copied.sources["calculator"] is doubled


@pytest.mark.parametrize("inputs", [{}, {"question": QUESTION, "mood": "calm"}])
def test_inputs_that_are_missing_or_unknown_are_refused(inputs: dict[str, str]) -> None:
    with pytest.raises(RouteError, match=r"missing|Unknown input"):
        town_agent()(**inputs)


@pytest.mark.parametrize("signature", ["question, results -> answer", "question -> trajectory"])
def test_names_that_the_agent_uses_are_refused(signature: str) -> None:
    with pytest.raises(RouteError, match="Rename them"):
        RoutedAgent(signature, tools=[search], encoder=bag_of_words)
