"""The agents benchmark, with `dspy.ReAct` and a one-call program on a scripted LM."""

import json
import re
from pathlib import Path
from typing import Any

import agents
import dspy
import pytest
from answer_log import AnswerLog

PEOPLE = {"Ostrel": 480, "Vand": 1200, "Pim": 36, "Lorn": 750}


def search(query: str) -> str:
    """Look up how many people live in a town."""
    return f"{query} has {PEOPLE[query]} inhabitants."


def right_number(task: dspy.Example, prediction: dspy.Prediction) -> bool:
    return prediction.answer == task.wanted


class OneCall(dspy.Module):
    """Looks the town up without an LM, and has one write the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question, results -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        trajectory = {"tool_name_0": "search", "tool_name_1": "finish"}
        answer = self.answer(question=question, results=search(question)).answer
        return dspy.Prediction(answer=answer, trajectory=trajectory)


def scripted(text: str) -> str:
    """Searches once, then answers with the number found; cannot cope with Pim, and ReAct errs about Vand."""
    town = next(town for town in PEOPLE if f"\n{town}\n" in text)
    if "next_tool_name" in text:
        name, arguments = ("finish", {}) if "observation_0" in text else ("search", {"query": town})
        return json.dumps({"next_thought": "Hm.", "next_tool_name": name, "next_tool_args": arguments})
    if town == "Pim":
        return "No."
    wrong = town == "Vand" and "trajectory" in text
    return json.dumps({"reasoning": "So it says.", "answer": "0" if wrong else str(PEOPLE[town])})


TASKS = [
    dspy.Example(question=town, wanted=str(people), tools=["search"]).with_inputs("question")
    for town, people in PEOPLE.items()
]


@pytest.fixture
def programs() -> dict[str, dspy.Module]:
    return {"dspy.ReAct": dspy.ReAct("question -> answer", tools=[search], max_iters=3), "one call": OneCall()}


def options(server: Any) -> Any:
    base = server.lm.kwargs["api_base"]
    return agents.command_line().parse_args(["--lm", "openai/small", "--api-base", base])


def test_both_run_every_task_and_all_their_calls_count(scripted_lm: Any, programs: Any, capsys: Any) -> None:
    server = scripted_lm(scripted)
    runs = agents.run(programs, TASKS, right_number, AnswerLog(None), options(server))
    react, one_call = runs["dspy.ReAct"], runs["one call"]
    assert [each.right for each in react] == [True, False, False, True]
    assert [each.answered for each in react] == [True, True, False, True]
    assert [each.right for each in one_call] == [True, True, False, True]
    assert [each.calls for each in react] == [3] * 4
    assert [each.tokens for each in one_call] == [25] * 4
    assert react[0].tools == one_call[0].tools == ["search", "finish"]
    assert len(server.requests) == sum(each.calls for each in (*react, *one_call)) == 16
    agents.report(runs, options(server))
    printed = capsys.readouterr().out
    assert re.search(r"dspy\.ReAct +50\.0 \(15\.0 to 85\.0\) +1 +3\.0 +60 \+ 15", printed)
    assert re.search(r"one call +75\.0 \(.+\) +1 +1\.0 +20 \+ 5", printed)
    assert re.search(r"\+25\.0 \(\+0\.0 to \+75\.0\) +1 / 0 +1 +0\.33 \(0\.33 to 0\.33\) +0\.33", printed)
    assert "A small local model on a CPU is not a hosted one" in printed


def test_a_run_that_was_killed_makes_no_run_twice(scripted_lm: Any, programs: Any, tmp_path: Path) -> None:
    server, path = scripted_lm(scripted), tmp_path / "runs.jsonl"
    whole = agents.run(programs, TASKS, right_number, AnswerLog(path), options(server))
    assert len(server.requests) == 16
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    resumed = agents.run(programs, TASKS, right_number, AnswerLog(path), options(server))
    assert len(server.requests) == 16 + json.loads(lines[-1])["calls"]
    assert {name: each[:3] for name, each in resumed.items()} == {name: each[:3] for name, each in whole.items()}
