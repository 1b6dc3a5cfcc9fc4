"""Every Python block of the README runs, in order, as a reader would run it."""

import re
from collections.abc import Callable
from pathlib import Path

import dspy
import pytest

from tests.conftest import ScriptedServer

README = Path(__file__).parent.parent / "README.md"
QUESTIONS = {
    "search": ["who wrote Hamlet?", "what is the capital of Peru?", "find news about Mars", "who invented the radio?"],
    "calculator": ["what is 3 plus 4?", "what is 12 times 5?", "compute 9 minus 2", "what is 81 divided by 9?"],
    "calendar": ["am I free on Monday?", "when is my next meeting?", "put lunch on Friday", "what is on tomorrow?"],
}

MESSAGES = [
    ("My card was charged twice", "billing", True),
    ("Please send the invoice again", "billing", False),
    ("The app crashes when I log in", "technical", True),
    ("The export button is grey", "technical", False),
    ("What does the large plan cost?", "sales", False),
    ("We need a quote for fifty seats today", "sales", True),
]

TEAMS = {
    "billing": "Invoices, charges and refunds.",
    "technical": "Crashes, errors and slow pages.",
    "sales": "Prices, plans and quotes.",
}
PHRASES = {
    "billing": ["my invoice of {} is wrong", "refund the charge of {}", "why was my card charged {}"],
    "technical": ["the page {} crashes", "error {} when I log in", "report {} loads slowly"],
    "sales": ["a quote for {} seats", "what does plan {} cost", "is there a discount for {} users"],
}


def team_messages(count: int, *, seed: int) -> list[dspy.Example]:
    examples = []
    for number in range(count):
        team = list(TEAMS)[number % 3]
        message = PHRASES[team][number // 3 % 3].format(f"{seed}-{number}")
        examples.append(dspy.Example(message=message, team=team).with_inputs("message"))
    return examples


class OldPlanner(dspy.Module):
    def forward(self, message: str) -> dspy.Prediction:
        return dspy.Prediction(team="sales")


def search(query: str) -> str:
    """Look up facts on the web."""
    return f"search {query}"


def calculator(expression: str) -> str:
    """Do arithmetic."""
    return f"calculator {expression}"


def calendar(day: str) -> str:
    """Read and change the user's appointments."""
    return f"calendar {day}"


def last_result(prompt: str) -> str:
    """An LM that answers with what the last tool gave."""
    results = prompt.split("[[ ## results ## ]]\n")[-1].split("\n\n")[0]
    return f"[[ ## answer ## ]]\n{results.rsplit('(): ', 1)[-1]}\n\n[[ ## completed ## ]]"


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted_lm: Callable[[Callable[[str], str]], ScriptedServer]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [
        dspy.Example(question=question, answer=f"{tool} {question}").with_inputs("question")
        for tool, questions in QUESTIONS.items()
        for question in questions
    ]
    names = {
        "search": search,
        "calculator": calculator,
        "calendar": calendar,
        "answer_is_right": lambda example, prediction, trace=None: example.answer == prediction.answer,
        "trainset": examples,
        "valset": examples[::2],
        "TEAMS": TEAMS,
        "old_planner": OldPlanner(),
        "sorted_messages": team_messages(400, seed=0),
        "new_messages": team_messages(400, seed=1),
        "right_team": lambda example, prediction: example.team == prediction.team,
        "labelled": [
            dspy.Example(message=message, team=team, urgent=urgent).with_inputs("message")
            for message, team, urgent in MESSAGES
        ],
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    with dspy.context(lm=scripted_lm(last_result).lm):
        for block in blocks:
            exec(block, names)
        answer = names["agent"](question="who invented the radio?")
    assert (answer.answer, answer.trajectory["tool_name_1"]) == ("search who invented the radio?", "finish")
    routed = names["routed"]
    assert routed(question="what is 17 times 23?").answer == "calculator what is 17 times 23?"
    assert names["prediction"].tool == "calendar"
    assert (tmp_path / "assistant.json").exists()
    answer = names["triage"](message="I was charged twice for my invoice")
    assert (answer.team, isinstance(answer.urgent, bool)) == ("billing", True)
    assert names["report"].coverage > 0.9
    assert names["guarded"].promise is None
    assert set(names["pair"](message="The invoice page crashes when I open it").teams) <= set(TEAMS)
    assert names["quick"](message="I was charged twice for my invoice").team == "billing"
    assert names["guarded"].field("team").option_names[-1] == "legal"
