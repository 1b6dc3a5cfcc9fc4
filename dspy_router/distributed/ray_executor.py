"""`RayExecutor`: the rollouts of `RouteFinetune` in worker processes of a Ray cluster."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dspy_router.distributed.cluster import PROBE_SECONDS, Cluster, in_pieces
from dspy_router.distributed.parcels import Parcels, cache_of_here, settings_of_here
from dspy_router.distributed.worker import RolloutWorker
from dspy_router.errors import RouteError
from dspy_router.optimizers.executors import LostExecutorError
from dspy_router.optimizers.rollouts import Rollout, ScoredProgram, Task

logger = logging.getLogger(__name__)

OnLost = Literal["raise", "threads"]
START_SECONDS = 300  # how long to wait for a first worker


@dataclass(eq=False)
class _Worker:
    """A worker process.

    Attributes:
        actor: Ray's handle of it.
        encoders: The names of those it has.
        program: The pieces of the one it was sent last.
        loading: The call that sent them, until that is answered. A worker may start long after that, and runs calls
            side by side, so it gets no other program meanwhile.
        ready: Whether it has the program of this round.
        running: How many rollouts it is running.
    """

    actor: Any
    encoders: set[str] = field(default_factory=set)
    program: list[bytes] | None = None
    loading: Any = None
    ready: bool = False
    running: int = 0


class RayExecutor:
    """Runs rollouts in worker processes of the Ray cluster that this process is a driver of (`ray.init`).

    Each worker gets the program, its heads as they are at that moment, the metric and DSPy's settings (LM, adapter,
    cache, whatever else is set there; no callbacks) once for every round of rollouts, and loads an encoder once. A
    rollout comes back as it is in threads, with its decisions, reward, tokens and cost, and this process alone writes
    the log. So with the same seed the result is the same, as far as program and metric are deterministic, keep nothing
    between runs, and do not depend on an LM cache that workers cannot share: DSPy's cache on disk is shared by the
    processes of a machine, the one in memory is each worker's own. Callbacks, traces and a `record_decisions` around
    the compile do not hear of what happens there.

    Where a worker dies, the rollouts that had ended stay, and those it was running are run again by others;
    `FinetuneReport.lost` counts them. Where the cluster goes away (`ray.shutdown`, a node or head that is killed), this
    process leaves it, since Ray would end the process after a minute, and `on_lost` says what comes then.

    Program, metric and settings are pickled, the API keys of LMs among them. They travel inside the calls and are never
    written to disk, unless they are larger than 10 MB: then they pass through Ray's object store, which is in memory
    and can be written to disk where that runs out. Use Ray's TLS where others can read the network.

    Args:
        workers: How many processes. Those that the cluster has no room for join in as it has.
        threads: Rollouts at once in each, for programs that wait for LMs. 1 keeps them apart.
        num_cpus: What each takes of the cluster's CPUs; it runs torch with as many threads.
        retries: How often a rollout whose worker died is run again before the compile stops with an error.
        on_lost: Where the cluster goes away, `"raise"` stops with an error, and a compile with the same `log_dir` goes
            on from there; `"threads"` goes on in threads.

    Raises:
        RouteError: If a number is out of range.

    Example:
        >>> from dspy_router import RouteFinetune
        >>> right = lambda example, prediction: prediction.tool == example.tool
        >>> optimizer = RouteFinetune(right, executor=RayExecutor(workers=2, on_lost="threads"))
    """

    def __init__(
        self, workers: int = 2, *, threads: int = 4, num_cpus: float = 1, retries: int = 2, on_lost: OnLost = "raise"
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("threads", threads, 1), ("retries", retries, 0)):
            if value < least:
                raise RouteError(f"{name}={value}; give {least} or more.")
        if on_lost not in get_args(OnLost):
            raise RouteError(f"on_lost={on_lost!r}; give 'raise' or 'threads'.")
        self.workers = workers
        self.threads = threads
        self.num_cpus = num_cpus
        self.retries = retries
        self.on_lost = on_lost
        self._parcels = Parcels()
        self._pool: list[_Worker] = []
        self._cluster: Cluster | None = None

    def execute(self, program: ScoredProgram, tasks: Sequence[Task], finish: Callable[[int, Rollout], bool]) -> int:
        """Run every task once, in the workers; see `Executor`.

        Raises:
            RouteError: If this process is connected to no cluster, something cannot be pickled or loaded in a worker,
                or a rollout's worker died once more than `retries`.
            LostExecutorError: If the cluster went away.
        """
        if self._cluster is None:  # asked once: what is gone does not answer
            self._cluster = Cluster()
        return _Round(self, self._cluster, program, tasks, finish).run()

    def close(self) -> None:
        """End the workers."""
        self._pool.clear()  # Ray ends an actor that nothing refers to
        self._parcels, self._cluster = Parcels(), None

    def __repr__(self) -> str:
        return (
            f"RayExecutor({self.workers}, threads={self.threads}, num_cpus={self.num_cpus}, retries={self.retries}, "
            f"on_lost={self.on_lost!r})"
        )


class _Round:
    """One `execute`: the tasks that wait, and the calls that the workers have not answered yet."""

    def __init__(
        self,
        executor: RayExecutor,
        cluster: Cluster,
        program: ScoredProgram,
        tasks: Sequence[Task],
        finish: Callable[[int, Rollout], bool],
    ) -> None:
        self.executor = executor
        self.finish = finish
        self.cluster = cluster
        self.ray = cluster.ray
        self.tasks = tasks
        self.parcels = [executor._parcels.pack(example=task) for task in tasks]
        parts = {"metric": program.metric, "program": program, "settings": settings_of_here()}
        self.program = in_pieces(executor._parcels.pack(**parts, cache=cache_of_here()))
        self.waiting = deque(range(len(tasks)))
        self.calls: dict[Any, tuple[_Worker, int | None]] = {}  # the task's index; None where a program is loaded
        self.deaths: Counter[int | None] = Counter()
        self.lost = 0
        self.stopped = False

    def run(self) -> int:
        """Run all tasks; how many runs were lost."""
        self.require_cluster()
        try:
            for worker in self.executor._pool:
                self.load(worker)
            heard = probed = time.monotonic()
            while self.running or (self.waiting and not self.stopped):
                self.start()
                answered, _ = self.ray.wait(list(self.calls), num_returns=1, timeout=PROBE_SECONDS)
                for call in answered:
                    self.take(call)
                now = time.monotonic()
                heard = now if answered or self.running else heard
                if now - probed > PROBE_SECONDS:
                    probed = now
                    self.require_cluster()
                if now - heard > START_SECONDS:
                    raise self.gone(f"No Ray worker has started for {START_SECONDS} seconds.")
        except RouteError:
            raise
        except (Exception, SystemExit) as error:  # the latter is what Ray raises in a call that a shutdown cuts short
            self.require_cluster(error)
            raise
        return self.lost

    @property
    def running(self) -> int:
        """How many rollouts are under way."""
        return sum(index is not None for _, index in self.calls.values())

    def start(self) -> None:
        """Start workers that are missing, and as many rollouts as there is room for."""
        pool = self.executor._pool
        while len(pool) < self.executor.workers:
            pool.append(_Worker(self.actor_class.remote()))
            self.load(pool[-1])
        while self.waiting and not self.stopped:
            free = [worker for worker in pool if worker.ready and worker.running < self.executor.threads]
            if not free:
                break
            worker = min(free, key=lambda worker: worker.running)
            index = self.waiting.popleft()
            worker.running += 1
            self.calls[worker.actor.run.remote(self.parcels[index])] = (worker, index)

    @property
    def actor_class(self) -> Any:
        """The workers' class; what Ray would do about their deaths is done here, where it is counted."""
        settings = {"num_cpus": self.executor.num_cpus, "max_concurrency": self.executor.threads}
        return self.ray.remote(max_restarts=0, max_task_retries=0, **settings)(RolloutWorker)

    def load(self, worker: _Worker) -> None:
        """Send the program to a worker, or wait until it has taken in the one before."""
        worker.ready, worker.running = False, 0
        if worker.loading is None:
            encoders, names = self.executor._parcels.encoders_beside(worker.encoders)
            worker.encoders |= names
            worker.program, worker.loading = self.program, worker.actor.load.remote(encoders, *self.program)
        self.calls[worker.loading] = (worker, None)

    def take(self, call: Any) -> None:
        """Take the answer to a call."""
        worker, index = self.calls[call]
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            self.require_cluster(error)
            del self.calls[call]
            self.bury(worker, index, error)
        except self.ray.exceptions.RayTaskError as error:
            if worker.program is self.program:
                raise RouteError(
                    f"A Ray worker could not {'load the program' if index is None else 'run a rollout'}: "
                    f"{error.cause!r}. What the program needs must be there as well: its modules "
                    "(ray.init(runtime_env=...) sends them), packages and files."
                ) from error
            del self.calls[call]
            self.loaded(worker)
        else:
            del self.calls[call]
            if index is None:
                self.loaded(worker)
            else:
                worker.running -= 1
                self.stopped |= not self.finish(index, answer)

    def loaded(self, worker: _Worker) -> None:
        """A worker is done with a program: this one, or that of a round before, which it may have failed to load."""
        self.deaths[None] = 0
        worker.loading = None
        worker.ready = worker.program is self.program
        if not worker.ready:
            self.load(worker)

    def bury(self, worker: _Worker, index: int | None, error: Exception) -> None:
        """See to a call whose worker died."""
        if worker in self.executor._pool:
            self.executor._pool.remove(worker)
            logger.warning("A Ray worker died; another takes its place: %s", error)
        self.deaths[index] += 1
        if index is not None:
            self.lost += 1
            self.waiting.appendleft(index)
        if self.deaths[index] > self.executor.retries:
            what = "it loaded the program" if index is None else f"it ran the example {self.tasks[index][1].key}"
            raise RouteError(
                f"{self.deaths[index]} times a Ray worker died while {what}; the last time: {error}\nRay's logs say "
                "why: often a node has too little memory for so many workers, or the program ends its process."
            ) from error

    def require_cluster(self, error: BaseException | None = None) -> None:
        """Raise unless the cluster is still there."""
        if not self.cluster.answers():
            raise self.gone("The Ray cluster is gone.") from error

    def gone(self, message: str) -> LostExecutorError:
        """The error to raise where nothing more is to be had from the cluster."""
        lost = self.lost + self.running
        self.calls.clear()
        self.executor.close()
        self.cluster.leave()
        return LostExecutorError(message, fall_back=self.executor.on_lost == "threads", lost=lost)
