"""What runs in a worker process of a Ray cluster."""

from typing import Any

import dspy

from dspy_router.distributed.parcels import Opener
from dspy_router.optimizers.rollouts import Rollout


class RolloutWorker:
    """A process that runs rollouts, several at once in threads; a Ray actor."""

    def __init__(self) -> None:
        self._opener = Opener()
        self._settings: dict[str, Any] = {}
        self._program: Any = None

    def load(self, encoders: bytes, *parcel: bytes) -> None:
        """Take in a program, in the pieces that `in_pieces` cut, and the encoders it needs beside those known."""
        self._opener.add_encoders(encoders)
        parts = self._opener.open(b"".join(parcel))
        dspy.configure_cache(**parts["cache"])
        self._program, self._settings = parts["program"], parts["settings"]

    def run(self, task: bytes) -> Rollout:
        """One rollout of the program loaded last."""
        job, keyed = self._opener.open(task)["example"]
        with dspy.context(**self._settings):
            return self._program.run(job, keyed)
