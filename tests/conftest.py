"""Fixtures: a fast encoder for unit tests, the real one for behaviour, and a real HTTP server for LM calls."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import SentenceEncoder
from dspy_router.encoders.choose import default_encoder
from tests.loopback import JsonServer

DIMENSION = 64


def bag_of_words(texts: list[str]) -> np.ndarray:
    """Each word adds one fixed random direction: texts that share words are near each other."""
    vectors = np.zeros((len(texts), DIMENSION), dtype=np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIMENSION)
    return vectors


@pytest.fixture
def words() -> Callable[[list[str]], np.ndarray]:
    return bag_of_words


@pytest.fixture(scope="session")
def sentence_encoder() -> SentenceEncoder:
    return default_encoder()


class ScriptedServer:
    """An OpenAI-compatible chat endpoint on loopback; `answer` makes the reply from the last user message."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.requests: list[str] = []
        self._answer = answer
        self._server = JsonServer(self._reply)
        self.close = self._server.close
        base = f"{self._server.url}/v1"
        self.lm = dspy.LM("openai/scripted", api_base=base, api_key="none", cache=False, max_tokens=200)

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        self.requests.append(text)
        message = {"role": "assistant", "content": self._answer(text)}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
        }  # fmt: skip


@pytest.fixture
def scripted_lm() -> Iterator[Callable[[Callable[[str], str]], ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def start(answer: Callable[[str], str]) -> ScriptedServer:
        servers.append(ScriptedServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
