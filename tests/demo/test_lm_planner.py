"""Reaching an LM planner, and what its answers are said to have taken."""

from collections.abc import Iterator
from typing import Any

import dspy
import pytest

from dspy_router.demo.assistant import PlanRequest
from dspy_router.demo.lm_planner import ask, how_to_read, planner_lm
from dspy_router.errors import RouteError
from tests.loopback import JsonServer

RIGHT = {"chat": "[[ ## tool ## ]]\nplay_music\n\n[[ ## completed ## ]]", "json": '{"tool": "play_music"}'}


class Bodies(JsonServer):
    """Gives one answer to everything, and keeps the whole of what it was sent."""

    def __init__(self, answer: str) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer = answer
        super().__init__(self._reply)
        self.base = f"{self.url}/v1"

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        message = {"role": "assistant", "content": self.answer}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
        }  # fmt: skip


@pytest.fixture
def server() -> Iterator[Bodies]:
    server = Bodies(RIGHT["json"])
    yield server
    server.close()


@pytest.mark.parametrize("adapter", ["chat", "json", "schema"])
def test_an_answer_says_what_it_took(server: Bodies, adapter: Any) -> None:
    server.answer = RIGHT["chat" if adapter == "chat" else "json"]
    with planner_lm("openai/small", adapter=adapter, api_base=server.base):
        answer = ask(dspy.Predict(PlanRequest), request="play some jazz")
    assert answer.prediction is not None
    assert answer.prediction.tool == "play_music"
    assert (answer.calls, answer.prompt_tokens, answer.completion_tokens) == (1, 20, 5)
    assert 0 < answer.seconds < 10
    (body,) = server.bodies
    assert body["model"] == "small"
    assert body["temperature"] == 0
    assert body.get("stop") == (["[[ ## completed ## ]]"] if adapter == "chat" else None)


def test_only_a_declared_server_is_sent_the_schema(server: Bodies) -> None:
    for adapter in ("json", "schema"):
        with planner_lm("openai/small", adapter=adapter, api_base=server.base):
            ask(dspy.Predict(PlanRequest), request="play some jazz")
    plain, constrained = server.bodies
    assert "response_format" not in plain
    assert "rate_book" in str(constrained["response_format"]["json_schema"]["schema"])


def test_a_schema_needs_a_server_of_ones_own() -> None:
    with pytest.raises(RouteError, match="give its api_base"):
        planner_lm("openai/gpt-4.1", adapter="schema")


@pytest.mark.parametrize("answer", ["I would rather not.", '{"tool": "make_coffee"}'])
def test_what_cannot_be_read_is_no_answer_but_was_paid_for(server: Bodies, answer: str) -> None:
    server.answer = answer
    with planner_lm("openai/small", adapter="chat", api_base=server.base):
        found = ask(dspy.Predict(PlanRequest), request="play some jazz")
    assert found.prediction is None
    assert (found.calls, found.prompt_tokens, found.completion_tokens) == (2, 40, 10)  # the adapter asks again in JSON


def test_a_model_without_a_price_is_said_to_be_no_hosted_one() -> None:
    assert "openai/small" in how_to_read("openai/small")
    assert "not a hosted one" in how_to_read("openai/small")
    assert "not a hosted one" not in how_to_read("openai/gpt-4.1-mini")
