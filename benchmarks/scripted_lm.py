"""An LM on loopback that plans ideally: a real HTTP server, so that prompts are sent and counted as to any other LM."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
from agent_tasks import Task

sys.path.append(str(Path(__file__).parents[1]))  # the server is the tests'
from tests.loopback import JsonServer

# A result in a prompt: of `dspy.ReAct`'s trajectory, or a line of the results of the other programs.
RESULT = re.compile(r"^(?:\[\[ ## observation_\d+ ## \]\]\n|\w+\(.*\): )(.*)$", re.MULTILINE)
# The instruction of the predictor that writes the arguments of a tool which `RoutedAgent` has chosen.
CHOSEN = re.compile(r"arguments of the next call of the tool `(\w+)`")


@contextmanager
def scripted_lm(tasks: Iterable[Task]) -> Iterator[dspy.LM]:
    """An LM that always writes what the tasks' plans and answers say."""
    by_question = {task.question: task for task in tasks}

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][-1]["content"]
        question = re.search(r"\[\[ ## question ## \]\]\n(.*)\n", prompt)
        assert question, prompt
        chosen = CHOSEN.search(body["messages"][0]["content"])
        content = ideal(by_question[question[1]], prompt, chosen and chosen[1])
        message = {"role": "assistant", "content": content}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }  # fmt: skip

    server = JsonServer(reply)
    try:
        yield dspy.LM("openai/scripted", api_base=f"{server.url}/v1", api_key="none", cache=False, max_tokens=500)
    finally:
        server.close()


def ideal(task: Task, prompt: str, chosen: str | None = None) -> str:
    """The fields that a prompt asks for, as a planner writes them that makes no mistake and knows what it is shown.

    Args:
        task: What the prompt is about.
        prompt: The last message.
        chosen: The tool whose arguments are asked for, if it was chosen already.
    """
    shown, _, asked = prompt.rpartition("Respond with")
    seen = [result[1] for result in RESULT.finditer(shown)]
    names = re.findall(r"\[\[ ## (\w+) ## \]\]", asked)
    done = len(seen)
    tool, arguments = task.plan[done] if done < len(task.plan) else ("finish", {})
    if chosen and (tool != chosen or seen != list(task.results[:done])):
        arguments = {"expression": "0"} if chosen == "calculator" else {"query": task.question}
    fields = {
        "next_thought": "All is known, so I can finish." if tool == "finish" else f"I need the {tool} tool next.",
        "reasoning": "The results say it.",
        "next_tool_name": tool,
        "next_tool": tool,
        "next_tool_args": json.dumps(arguments),
        "tool_input": next(iter(arguments.values()), ""),
        "answer": task.answer if task.results[-1] in seen else "unknown",
    }
    return "\n\n".join(f"[[ ## {name} ## ]]\n{fields.get(name, '')}".rstrip() for name in names)
