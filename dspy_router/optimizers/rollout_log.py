"""Rollouts on disk: each is written as it ends, so that nothing paid for is lost or paid twice."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspy_router.errors import RouteError

logger = logging.getLogger(__name__)


class RolloutLog:
    """An append-only JSONL file of finished rollouts, each found again by what was run.

    A line cut short by a crash is passed over; the rollout it stood for is run again.

    Args:
        folder: Created if missing; the file in it is `rollouts.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rollouts.jsonl"
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            for line in text.split("\n"):  # splitlines would cut at other separators that texts hold
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = json.dumps(entry["rollout"], ensure_ascii=False)
                except (ValueError, KeyError, TypeError):
                    continue
            if text and not text.endswith("\n"):
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        if self._known:
            logger.warning(
                "%s holds %s rollouts: the same are not run again and keep the rewards they had. Give another metric "
                "or another program a log_dir of its own.",
                self.path,
                f"{len(self._known):,}",
            )

    def __len__(self) -> int:
        return len(self._known)

    def find(self, phase: str, example: str, forced: list[list[Any]]) -> str | None:
        """The JSON of the rollout that ran this, or None."""
        return self._known.get(_key(phase, example, forced))

    def append(self, phase: str, example: str, forced: list[list[Any]], rollout: str) -> None:
        """Write one rollout's JSON and flush it."""
        key = _key(phase, example, forced)
        line = json.dumps({"key": key, "rollout": json.loads(rollout)}, ensure_ascii=False)
        with self._lock:
            self._known[key] = rollout
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep a log folder to one compile; the lock falls with the process, however that ends.

    Raises:
        RouteError: If another compile is using the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "in_use.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RouteError(
            f"Another compile is writing to log_dir={str(folder)!r}. Wait for it to end, or give this one a folder of "
            "its own."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _key(phase: str, example: str, forced: list[list[Any]]) -> str:
    return json.dumps([phase, example, forced], ensure_ascii=False)
