"""Where rollouts run: in DSPy's worker threads, or wherever else an executor takes them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dspy.utils.parallelizer import ParallelExecutor

from dspy_router.errors import RouteError

if TYPE_CHECKING:
    from dspy_router.optimizers.rollouts import Rollout, ScoredProgram, Task


class Executor(Protocol):
    """Runs the rollouts of a compile, as many at once as it sees fit."""

    def execute(
        self, program: "ScoredProgram", tasks: "Sequence[Task]", finish: "Callable[[int, Rollout], bool]"
    ) -> int:
        """Run every task once.

        Args:
            program: Runs a task and scores it, with the heads as they are now.
            tasks: What to run.
            finish: To be called in this process with a task's index and its rollout as soon as that has ended. Where
                it returns False, no further task is to be started.

        Returns:
            How many runs were lost before they ended, and were run again.

        Raises:
            LostExecutorError: If the place where rollouts run is gone.
        """

    def close(self) -> None:
        """Give back what was held for the compile, which is over."""


class LostExecutorError(RouteError):
    """The place where rollouts run is gone.

    Attributes:
        fall_back: Whether what is left is to run in threads.
        lost: How many runs were lost before they ended.
    """

    def __init__(self, message: str, *, fall_back: bool, lost: int) -> None:
        super().__init__(message)
        self.fall_back = fall_back
        self.lost = lost


@dataclass(frozen=True)
class ThreadExecutor:
    """DSPy's own worker threads.

    Attributes:
        num_threads: As in `dspy.Evaluate`.
    """

    num_threads: int | None = None

    def execute(
        self, program: "ScoredProgram", tasks: "Sequence[Task]", finish: "Callable[[int, Rollout], bool]"
    ) -> int:
        """Run every task once, in threads that share the program; see `Executor`."""
        stopped = threading.Event()

        def run(index: int) -> None:
            if not stopped.is_set() and not finish(index, program.run(*tasks[index])):
                stopped.set()

        # No timeout: DSPy would run a slow rollout a second time and pay twice.
        executor = ParallelExecutor(
            num_threads=self.num_threads, max_errors=len(tasks) + 1, disable_progress_bar=True, timeout=0
        )
        executor.execute(run, range(len(tasks)))
        for error in executor.exceptions_map.values():  # of `finish`: what a program raises is in its rollout
            raise error
        return 0

    def close(self) -> None:
        """Nothing is held."""
