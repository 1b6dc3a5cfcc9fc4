"""Calling a tool, with a limit on how long that may take."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_router.agent.tools import is_async


@dataclass(frozen=True)
class ToolCall:
    """A tool about to be called; a step of the loop, which `driving` takes.

    A call that has not ended in time raises `TimeoutError`, and what it gives later is lost. Only a coroutine can be
    stopped: a thread goes on until its function returns, so a tool that can hang should have a timeout of its own.

    Attributes:
        tool: What is called.
        arguments: By name.
        timeout: Seconds; None waits.
    """

    tool: dspy.Tool
    arguments: Mapping[str, Any]
    timeout: float | None = None

    def run(self) -> Any:
        """Call the tool, in a thread of its own if there is a timeout."""
        if self.timeout is None:
            return self.tool(**self.arguments)
        future = _in_thread(self.tool, self.arguments)
        if not wait([future], self.timeout).done:
            raise self._late()
        return future.result()

    async def arun(self) -> Any:
        """Call the tool with the event loop free: a function that is not asynchronous runs in a thread of its own."""

        async def function(**arguments: Any) -> Any:
            found = await asyncio.wrap_future(_in_thread(self.tool.func, arguments))
            return await found if asyncio.iscoroutine(found) else found

        tool = self.tool if is_async(self.tool) else self.tool.model_copy(update={"func": function})
        task = asyncio.ensure_future(tool.acall(**self.arguments))
        try:
            if not (await asyncio.wait({task}, timeout=self.timeout))[0]:
                raise self._late()
            return task.result()
        finally:
            task.cancel()

    def _late(self) -> TimeoutError:
        return TimeoutError(f"{self.tool.name} gave no result within {self.timeout} seconds")


def _in_thread(function: Callable[..., Any], arguments: Mapping[str, Any]) -> "Future[Any]":
    """A call in a thread that ends with the process, which a pool's would keep alive."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def call() -> None:
        try:
            future.set_result(function(**arguments))
        except StopIteration as error:  # which would pass for the end of whoever waits
            future.set_exception(RuntimeError(repr(error)))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True).start()
    return future
