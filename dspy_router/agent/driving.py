"""Driving a loop that is written once, for sync and for async: it yields its steps, and gets their results back."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import dspy

Result = TypeVar("Result")


class Step(Protocol):
    """Something to wait for."""

    def run(self) -> Any:
        """Its result."""

    async def arun(self) -> Any:
        """Its result, for async code."""


@dataclass(frozen=True)
class ModuleCall:
    """A module about to be called."""

    module: dspy.Module
    inputs: Mapping[str, Any]

    def run(self) -> Any:
        """Call the module."""
        return self.module(**self.inputs)

    async def arun(self) -> Any:
        """Call the module for async code."""
        return await self.module.acall(**self.inputs)


Steps = Generator[Step, Any, Result]


def drive(steps: Steps[Result]) -> Result:
    """Run steps to their end; what a step raises is raised inside the generator, where it stands.

    Example:
        >>> def doubled():
        ...     found = yield ModuleCall(lambda number: 2 * number, {"number": 3})
        ...     return found + 1
        >>> drive(doubled())
        7
    """
    try:
        step = next(steps)
        while True:
            try:
                result = step.run()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return end.value


async def adrive(steps: Steps[Result]) -> Result:
    """`drive` for async code."""
    try:
        step = next(steps)
        while True:
            try:
                result = await step.arun()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return end.value
