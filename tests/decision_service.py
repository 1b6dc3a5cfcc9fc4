"""DSPy's own decision client over HTTP: a loopback service that it calls, which answers with a `DecisionClient`."""

from collections.abc import Mapping
from typing import Any

from dspy.clients.typesafe import TypeSafe

from dspy_router import DecisionClient
from tests.loopback import JsonServer


class DecisionService:
    """What DSPy's own client gets from the service is what `client` answers."""

    def __init__(self, client: DecisionClient) -> None:
        self._client = client
        self._server = JsonServer(self._reply)
        self.close = self._server.close

    def client(self, **settings: Any) -> TypeSafe:
        return TypeSafe("scripted", api_key="none", base_url=self._server.url, **settings)

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        answers = self._client(state=body["state"], questions=body["questions"])
        return {
            "model": body["model"],
            "usage": {"input_tokens": 7, "output_tokens": 1},
            "answers": {name: _wire(answer, body["questions"][name]) for name, answer in answers.items()},
        }


def _wire(answer: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as the service's protocol has it."""
    legend = {"legend": dict(enumerate(question["criteria"]))} if question["type"] == "score" else {}
    return {"type": question["type"], **answer, **legend}
