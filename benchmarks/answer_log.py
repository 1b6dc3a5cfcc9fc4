"""What an LM has answered, on disk as it comes: a run that was killed resumes and pays for nothing twice."""

import hashlib
import json
from pathlib import Path
from typing import Any


class AnswerLog:
    """JSON lines, one an answer, found again by what was asked.

    Args:
        path: The file; made with its folder if it is not there. None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        self._torn = False
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the run was killed while it wrote this line
                    continue
                self._records[record["key"]] = record
            self._torn = bool(text) and not text.endswith("\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of what was asked, or None."""
        return self._records.get(key)

    def add(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write a record, at once."""
        record = {"key": key, **record}
        self._records[key] = record
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + json.dumps(record, ensure_ascii=False) + "\n")
            self._torn = False
        return record


def key_of(*asked: Any) -> str:
    """A key for all that decides an answer: the LM, the adapter, the prompt."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()[:24]
