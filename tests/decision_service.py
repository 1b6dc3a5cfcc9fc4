"""DSPy's own decision client over HTTP: a loopback service that it calls, which answers with a `DecisionClient`."""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dspy.clients.typesafe import TypeSafe

from dspy_router import DecisionClient


class DecisionService:
    """What DSPy's own client gets from the service is what `client` answers; `requests` counts them."""

    def __init__(self, client: DecisionClient) -> None:
        self.requests: list[dict[str, Any]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(body)
                answers = client(state=body["state"], questions=body["questions"])
                reply = {
                    "model": body["model"],
                    "usage": {"input_tokens": 7, "output_tokens": 1},
                    "answers": {name: _wire(answer, body["questions"][name]) for name, answer in answers.items()},
                }
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def client(self, **settings: Any) -> TypeSafe:
        return TypeSafe("scripted", api_key="none", base_url=self.url, **settings)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _wire(answer: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as the service's protocol has it."""
    legend = {"legend": dict(enumerate(question["criteria"]))} if question["type"] == "score" else {}
    return {"type": question["type"], **answer, **legend}
