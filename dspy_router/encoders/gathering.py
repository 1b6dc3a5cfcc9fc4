"""Concurrent calls share batches: who waits, which batch is next, and which thread runs it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Gathering:
    """Encodes the texts of concurrent callers in shared batches, in the order in which they came.

    While fewer batches run than may, a call starts one at once. Otherwise it waits, with no timer, until one ends;
    the next batch then holds the text that has waited longest and whatever else `choose` puts with it. So a call
    waits at most for the batches of those who came before it, and a lone call for nobody.

    A blocking caller runs batches in its own thread until its own text is done. The others' texts are left to a thread
    that lives while somebody waits; so there is none to close, and none that a fork could lose while all is quiet.

    Args:
        encode: From a batch of texts to their vectors [n, d]. Called by at most `workers()` threads at once.
        choose: From the texts that wait, in the order in which they came, to the indices of the next batch, the
            first among them.
        workers: How many batches may run at once.
    """

    def __init__(
        self,
        encode: "Callable[[list[str]], np.ndarray]",
        choose: Callable[[list[str]], Sequence[int]],
        workers: Callable[[], int],
    ) -> None:
        self._encode = encode
        self._choose = choose
        self._workers = workers
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, Future[np.ndarray]]] = []
        self._working = 0

    def encode(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """The vectors [d] of texts; the calling thread helps.

        Raises:
            Exception: What `encode` raised for a batch that held one of the texts.
        """
        futures, first = self._enqueue(texts)
        if first:
            self._work(futures)
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def submit(self, text: str) -> "Future[np.ndarray]":
        """The vector [d] of a text, later: no thread of the caller's is needed. A cancelled call is passed over."""
        (future,), first = self._enqueue([text])
        if first:
            self._start_worker()
        return future

    def _enqueue(self, texts: Sequence[str]) -> "tuple[list[Future[np.ndarray]], bool]":
        """The texts' futures, and whether the caller is to see to them since another batch may run."""
        futures: list[Future[np.ndarray]] = [Future() for _ in texts]
        with self._lock:
            self._waiting.extend(zip(texts, futures, strict=True))
            first = self._working < self._workers()
            self._working += first
        return futures, first

    def _start_worker(self) -> None:
        threading.Thread(target=self._work, name="dspy_router encoder").start()

    def _work(self, own: "Sequence[Future[np.ndarray]] | None" = None) -> None:
        """Run batches until nobody waits or, in a caller's thread, until its own texts are done."""
        try:
            while own is None or not all(future.done() for future in own):
                batch = self._next_batch()
                if not batch:
                    break
                self._run(batch)
        finally:
            with self._lock:
                others = bool(self._waiting)
                self._working -= not others
            if others:
                self._start_worker()

    def _next_batch(self) -> "list[tuple[str, Future[np.ndarray]]]":
        with self._lock:
            self._waiting = [(text, future) for text, future in self._waiting if not future.cancelled()]
            if not self._waiting:
                return []
            chosen = set(self._choose([text for text, _ in self._waiting]))
            batch = [entry for index, entry in enumerate(self._waiting) if index in chosen]
            self._waiting = [entry for index, entry in enumerate(self._waiting) if index not in chosen]
            another = bool(self._waiting) and self._working < self._workers()
            self._working += another
        if another:
            self._start_worker()
        return batch

    def _run(self, batch: "list[tuple[str, Future[np.ndarray]]]") -> None:
        # Cancelled since it was chosen, or now running and past cancelling.
        batch = [(text, future) for text, future in batch if future.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            vectors = self._encode([text for text, _ in batch])
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), vector in zip(batch, vectors, strict=True):
                future.set_result(vector)
