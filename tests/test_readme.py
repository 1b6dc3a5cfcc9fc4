"""Every Python block of the README runs, in order, as a reader would run it."""

import re
from pathlib import Path

import dspy
import pytest

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


def search(query: str) -> str:
    """Look up facts on the web."""
    return f"search {query}"


def calculator(expression: str) -> str:
    """Do arithmetic."""
    return f"calculator {expression}"


def calendar(day: str) -> str:
    """Read and change the user's appointments."""
    return f"calendar {day}"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        "labelled": [
            dspy.Example(message=message, team=team, urgent=urgent).with_inputs("message")
            for message, team, urgent in MESSAGES
        ],
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    routed = names["routed"]
    assert routed(question="what is 17 times 23?").answer == "calculator what is 17 times 23?"
    assert names["prediction"].tool == "calendar"
    assert (tmp_path / "assistant.json").exists()
    answer = names["triage"](message="I was charged twice for my invoice")
    assert (answer.team, isinstance(answer.urgent, bool)) == ("billing", True)
