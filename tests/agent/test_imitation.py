import json
from dataclasses import replace

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from dspy_router.agent.imitation import Episode, Step, imitation_rows, react_episode, split_by_task
from dspy_router.agent.state import StepState
from dspy_router.encoders.step import StepEncoder
from dspy_router.feedback import read_feedback, write_feedback
from dspy_router.optimizers.learner import field_rows
from tests.conftest import bag_of_words

NAMES = ("search", "calculator", "finish")
REQUEST = "How many people live in Ostrel and Vell?"


def search(query: str) -> str:
    """Look it up."""
    if query == "Vell":
        raise KeyError("no such town")
    return f"{query} has 48200 inhabitants."


def calculator(expression: str) -> float:
    """Do sums."""
    return 48200.0


def test_a_react_run_gives_the_states_of_a_routed_agent() -> None:
    steps = [
        ("search", {"query": "Ostrel"}),
        ("search", {"query": "Vell"}),
        ("calculator", {"expression": "1"}),
        ("finish", {}),
    ]
    replies = [
        {"next_thought": "so", "next_tool_name": name, "next_tool_args": json.dumps(arguments)}
        for name, arguments in steps
    ]
    react = dspy.ReAct("question -> answer", tools=[search, calculator])
    with dspy.context(lm=DummyLM([*replies, {"reasoning": "so", "answer": "48200"}])):
        prediction = react(question=REQUEST)
    episode = react_episode("question -> answer", {"question": REQUEST}, prediction, task="1", reward=0.5)
    assert (episode.task, episode.run, episode.reward) == ("1", "1", 0.5)
    assert [step.chosen for step in episode.steps] == [name for name, _ in steps]
    states = [step.state for step in episode.steps]
    assert states[0] == StepState(REQUEST)
    assert states[1] == StepState(REQUEST, "Ostrel has 48200 inhabitants.", ("search",))
    assert states[2].failed
    assert states[2].observation.startswith("Execution error in search")
    assert states[3] == StepState(REQUEST, "48200.0", ("search", "search", "calculator"))


def test_a_react_v2_run_gives_the_same_steps() -> None:
    def event(number: int, name: str, value: object, failed: bool = False) -> dict[str, object]:
        made = dspy.ToolCalls.ToolCall(id=str(number), name=name, args={"query": str(number)})
        results = dspy.ToolCallResults.from_tool_calls_and_values([made], [value], [failed])
        return {"tool_calls": dspy.ToolCalls(tool_calls=[made], tool_call_results=results)}

    events = [
        {"question": "Of an earlier run?", **event(0, "calculator", 7)},
        {"question": REQUEST, **event(0, "search", "48200")},
        event(1, "search", "Execution error", failed=True),
        event(2, "submit", {"answer": "48200"}),
    ]
    prediction = dspy.Prediction(answer="48200", history=dspy.History(messages=events))
    episode = react_episode("question -> answer", {"question": REQUEST}, prediction, task="1", reward=1.0)
    expected = [
        Step(StepState(REQUEST), "search"),
        Step(StepState(REQUEST, "48200", ("search",)), "search"),
        Step(StepState(REQUEST, "Execution error", ("search", "search"), True), "finish"),
    ]
    assert list(episode.steps) == expected


def test_a_run_may_be_rewarded_with_what_a_metric_gave() -> None:
    prediction = {"trajectory": {"tool_name_0": "finish", "tool_args_0": {}, "observation_0": "Completed."}}
    verdict = dspy.Prediction(score=0.5, feedback="half of it")
    episode = react_episode("question -> answer", {"question": REQUEST}, prediction, task="1", reward=verdict)
    [row] = imitation_rows([episode], candidates=["finish"], failed=0.2)
    assert (row.reward, row.weight) == (0.5, pytest.approx(0.6))


def test_a_trajectory_that_was_cut_or_is_missing_is_refused() -> None:
    cut = {"trajectory": {"tool_name_1": "search", "tool_args_1": {}, "observation_1": "so"}}
    bare = {"tool_name_0": "search", "tool_args_0": {}, "observation_0": "so"}
    for prediction, message in (
        (cut, r"holds the steps \[1\]"),
        ({"answer": "so"}, r"neither a trajectory nor a history, only \['answer'\]\.$"),
        (bare, r'given as \{"trajectory": \.\.\.\}'),
    ):
        with pytest.raises(RouteError, match=message):
            react_episode("question -> answer", {"question": REQUEST}, prediction, task="1", reward=1.0)


def episode(task: str, first: str, reward: float, *, trial: int = 0) -> Episode:
    start = StepState(f"please {task}")
    steps = (Step(start, first), Step(start.after(first, f"found by {first}"), "finish"))
    return Episode(task, f"{task}/{trial}", reward, steps)


def test_rows_are_weighted_by_their_runs_reward() -> None:
    episodes = [episode("a", "search", 1.0), episode("b", "search", 0.5), episode("c", "search", 0.0)]
    weights = {row.run: row.weight for row in imitation_rows(episodes, candidates=NAMES)}
    assert weights == {"a/0": 1.0, "b/0": 0.75, "c/0": 0.5}
    weights = {row.run: row.weight for row in imitation_rows(episodes, candidates=NAMES, failed=0.0)}
    assert weights == {"a/0": 1.0, "b/0": 0.5}
    weights = {row.run: row.weight for row in imitation_rows(episodes, candidates=NAMES, failed=1.0)}
    assert weights == {"a/0": 1.0, "b/0": 1.0, "c/0": 1.0}


def test_to_finish_is_a_candidate_where_a_run_did() -> None:
    rows = imitation_rows([episode("a", "search", 1.0)], candidates=["search", "calculator"])
    assert {row.candidates for row in rows} == {("search", "calculator", "finish")}
    assert rows == imitation_rows([episode("a", "search", 1.0)], candidates=NAMES)
    replies = [Episode("a", "a/0", 1.0, (Step(StepState("hello"), "reply"),))]
    assert imitation_rows(replies, candidates=["search", "reply"])[0].candidates == ("search", "reply")


def test_a_route_learns_the_steps_and_from_good_runs_more(tmp_path: object) -> None:
    good = [episode(f"look up {number}", "search", 1.0) for number in range(6)]
    good += [episode(f"add up {number}", "calculator", 1.0) for number in range(6)]
    bad = [episode(f"look up {number}", "calculator", 0.0, trial=trial) for number in range(6) for trial in (1, 2)]
    route = DifferentiableRoute("state -> next_tool", tools=NAMES, encoder=StepEncoder(bag_of_words, NAMES[:2]))

    def learned(failed: float) -> list[str]:
        rows = imitation_rows([*good, *bad], candidates=NAMES, failed=failed)
        trained = RouteFinetune().compile(route, feedback=rows)
        start = StepState("please look up 9")
        return [trained(state=state.to_text()).next_tool for state in (start, start.after("search", "found by search"))]

    assert learned(0.0) == ["search", "finish"]
    assert learned(1.0) == ["calculator", "finish"]


def test_runs_of_a_task_keep_all_their_steps_and_are_held_out_together() -> None:
    episodes = [episode("a", first, 1.0, trial=trial) for trial, first in enumerate(["search", "search", "calculator"])]
    route = DifferentiableRoute("state -> next_tool", tools=NAMES, encoder=StepEncoder(bag_of_words, NAMES[:2]))
    [found] = field_rows({"self": route}, imitation_rows(episodes, candidates=NAMES, route="self"))
    assert found.examples == ["a"] * 6
    assert found.rows.target.argmax(axis=1).tolist() == [0, 2, 0, 2, 1, 2]


def test_a_label_of_a_state_overrules_the_runs() -> None:
    rows = imitation_rows([episode("a", "search", 1.0)], candidates=NAMES, route="self")
    label = replace(rows[0], source="label", chosen="calculator", run="", weight=1.0)
    route = DifferentiableRoute("state -> next_tool", tools=NAMES, encoder=StepEncoder(bag_of_words, NAMES[:2]))
    [found] = field_rows({"self": route}, [label, *rows])
    assert found.rows.target.argmax(axis=1).tolist() == [2, 1]


def test_rows_survive_their_file(tmp_path: pytest.TempPathFactory) -> None:
    rows = imitation_rows([episode("a", "search", 0.5)], candidates=NAMES)
    write_feedback(rows, f"{tmp_path}/rows.jsonl")
    assert read_feedback(f"{tmp_path}/rows.jsonl") == rows


def test_no_task_is_on_both_sides_and_every_episode_is_on_one() -> None:
    episodes = [episode(task, "search", 1.0, trial=trial) for task in "abcdefghij" for trial in range(3)]
    train, test = split_by_task(episodes, share=0.3, seed=1)
    assert len({entry.task for entry in test}) == 3
    assert not {entry.task for entry in train} & {entry.task for entry in test}
    assert sorted(entry.run for entry in [*train, *test]) == sorted(entry.run for entry in episodes)
    assert split_by_task(episodes, share=0.3, seed=1) == (train, test)
    assert split_by_task(episodes, share=0.3, seed=2) != (train, test)
    assert len(split_by_task(episodes[:6], share=0.01)[1]) == 3


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(RouteError, match=r"reward 2\.0"):
        episode("a", "search", 2.0)
    with pytest.raises(RouteError, match="chose 'mail', which is no candidate"):
        imitation_rows([episode("a", "mail", 1.0)], candidates=NAMES)
    with pytest.raises(RouteError, match="failed=2"):
        imitation_rows([], candidates=NAMES, failed=2)
    with pytest.raises(RouteError, match="1 tasks"):
        split_by_task([episode("a", "search", 1.0)])
