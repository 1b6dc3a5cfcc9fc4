"""Programs that say in which process they ran, for tests that end such a process at a chosen moment."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dspy

from dspy_router import DifferentiableRoute
from dspy_router.encoders.function import FunctionEncoder
from tests.conftest import bag_of_words
from tests.programs import FRUIT, Shop


class Telling(FunctionEncoder):
    """An encoder that adds a line with the process's number to a file whenever it is loaded."""

    def __init__(self, file: Path) -> None:
        super().__init__(bag_of_words)
        self.file = file

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "file": self.file}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        tell(self.file)


class TellingShop(Shop):
    """A shop whose file has a line for every run that was started; a run takes a while."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        super().__init__(DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=Telling(folder / "encoders")))
        self.file = folder / "runs"
        self.seconds = seconds

    def forward(self, request: str) -> dspy.Prediction:
        tell(self.file)
        time.sleep(self.seconds)
        return super().forward(request=request)


class Greeting(Shop):
    """An LM call before the decision."""

    def __init__(self) -> None:
        super().__init__()
        self.greet = dspy.Predict("request -> reply")

    def forward(self, request: str) -> dspy.Prediction:
        self.greet(request=request)
        return super().forward(request=request)


class Ending(Shop):
    """Ends its process."""

    def forward(self, request: str) -> dspy.Prediction:
        os._exit(1)


def tell(file: Path) -> None:
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")


def told(file: Path) -> list[int]:
    """The numbers that `tell` wrote."""
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def once(condition: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """A thread that does something as soon as a condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
