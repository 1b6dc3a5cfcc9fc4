"""A language model by rules: an OpenAI-compatible server on loopback that heeds what its prompt says.

It does a task well if the prompt holds a demonstration or `RULE`, if it was fine-tuned, if the request is polite, or
at every second try with a temperature. As a proposer of instructions, rules or advice it proposes `RULE`. So
an optimizer that does its job makes the program better, and one that does not, does not.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.compat.concierge import PLACES, choose_by_hint
from tests.loopback import JsonServer

RULE = "Answer with the bare fact."
MODEL, TUNED = "scripted", "scripted-tuned"
TASK_FIELDS = {"tool", "place", "urgent", "reasoning", "reply"}


@dataclass(frozen=True)
class Request:
    """What the model was asked."""

    model: str
    messages: list[dict[str, str]]
    temperature: float

    @property
    def outputs(self) -> dict[str, str]:
        """Output field to type, as the adapter lists them; none where the prompt is free text."""
        listed = self.messages[0]["content"].partition("Your output fields are:")[2].partition("All interactions")[0]
        return dict(re.findall(r"^\d+\. `(\w+)` \((.*?)\)", listed, re.MULTILINE))

    @property
    def inputs(self) -> dict[str, str]:
        """Input field to value."""
        parts = re.split(r"\[\[ ## (\w+) ## \]\]\n", self.messages[-1]["content"].split("\n\nRespond with")[0])
        return {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)}

    @property
    def instructions(self) -> str:
        return self.messages[0]["content"].split("your objective is:")[1].strip()

    @property
    def is_task(self) -> bool:
        """Whether a predictor of the program asks, rather than a proposer of an optimizer."""
        return bool(self.outputs) and set(self.outputs) <= TASK_FIELDS


class ScriptedModel:
    """The server; `requests` holds what it was asked, in order."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._tries: Counter[tuple[str, ...]] = Counter()
        self._server = JsonServer(self.complete)
        self.url = f"{self._server.url}/v1"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        request = Request(body["model"], body["messages"], body.get("temperature") or 0.0)
        self.requests.append(request)
        answers = [self.answer(request) for _ in range(body.get("n") or 1)]
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [
                {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
                for index, answer in enumerate(answers)
            ],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
        }  # fmt: skip

    def answer(self, request: Request) -> str:
        if not request.outputs:  # how DSPy 3.4.0's GEPA asks for an instruction, and where it looks for it
            return f"```\n{self.proposal('instruction', request)}\n```"
        able = request.is_task and self.able(request)
        values = {name: self.value(name, kind, request, able) for name, kind in request.outputs.items()}
        if "JSON object" in request.messages[-1]["content"]:
            return json.dumps(values)
        fields = [f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()]
        return "\n\n".join([*fields, "[[ ## completed ## ]]"])

    def able(self, request: Request) -> bool:
        """Whether the model answers a task well."""
        said = request.inputs["request"]
        self._tries[(*request.outputs, said)] += request.temperature >= 1
        lucky = request.temperature >= 1 and self._tries[(*request.outputs, said)] % 2 == 0
        advised = any(RULE in message["content"] for message in request.messages) or len(request.messages) > 2
        return lucky or advised or request.model == TUNED or "please" in said

    def value(self, name: str, kind: str, request: Request, able: bool) -> str:
        if not request.is_task:
            return self.proposal(name, request)
        words = request.inputs["request"].split()
        if name == "tool":
            return choose_by_hint(request.inputs["request"]).tool
        if name == "place":
            return next(word for word in words if word in PLACES) if able else " ".join(words)
        if name == "urgent" and kind == "NoulEvidence":  # ranks rightly, and is far too unsure
            return json.dumps({"noul": 0.3 if "quickly" in words else 0.1})
        if name == "urgent":
            return str(able and "quickly" in words)
        if name == "reply":
            finding = request.inputs["finding"]
            return f"It is {finding}." if able else f"I looked around and found {finding}, dear guest."
        return "The request says so."

    def proposal(self, name: str, request: Request) -> str:
        if name in ("advice", "module_advice"):
            return json.dumps(dict.fromkeys(json.loads(request.inputs["module_names"]), RULE))
        self._tries[(name,)] += 1
        return f"{RULE} Wording {self._tries[(name,)]}."

    def close(self) -> None:
        self._server.close()
