"""Python's overhead of one decision, counted in bytecode instructions: the same count on every run and machine.

Time would tell a busy machine from a quiet one, not good code from bad. What numpy does in C is not counted here;
`benchmarks/instructions.py` counts that, where valgrind is installed.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import dspy
import numpy as np

from dspy_router import DifferentiableRoute
from dspy_router.encoders.function import FunctionEncoder


class Nothing(dspy.Module):
    """A module that does nothing: what is left is DSPy's own."""

    def forward(self, text: str) -> dspy.Prediction:
        return dspy.Prediction(option="")


def instructions(call: Callable[[], Any]) -> int:
    """Bytecode instructions that a call executes in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def route_among(options: int) -> DifferentiableRoute:
    encoder = FunctionEncoder(lambda texts: np.ones((len(texts), 8), np.float32), cache_size=0)
    return DifferentiableRoute(
        "text -> option", tools=[f"option {number}" for number in range(options)], encoder=encoder
    )


def counted(module: dspy.Module) -> int:
    module(text="warm up")
    counts = {instructions(lambda: module(text="a text")) for _ in range(3)}
    assert len(counts) == 1, counts
    return counts.pop()


def test_a_decision_stays_within_its_instructions() -> None:
    assert counted(route_among(10)) < 10 * counted(Nothing())  # 9.3 with CPython 3.11 and DSPy 3.4.1


def test_no_instruction_is_spent_on_each_option() -> None:
    assert counted(route_among(1000)) == counted(route_among(10))
