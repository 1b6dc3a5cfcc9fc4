"""How many threads torch uses for small work, without touching the user's torch settings."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

# Below this many multiplications a second intra-op thread gains little, and on busy cores it can cost forty times.
# It is a fixed number, so that a fit sums in the same order wherever it runs.
SMALL_WORK = 500_000_000


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """One intra-op thread inside the block if the work is small, else as many as the user has set."""
    if multiplications >= SMALL_WORK:
        yield
        return
    with at_most_threads(1):
        yield


@contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """At most so many intra-op threads inside the block.

    Both limits, OpenMP's and MKL's, belong to the calling thread, so they change nothing elsewhere.
    """
    import torch

    # In a thread that is new to torch, this sets up the thread's own count, which would else come later and undo the
    # limit.
    count = min(count, torch.get_num_threads())
    limit_mkl = _mkl_limit()
    with _openmp().limit(limits=count):
        before = limit_mkl(count)
        try:
            yield
        finally:
            limit_mkl(before)


@lru_cache(maxsize=1)
def _openmp() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")


@lru_cache(maxsize=1)
def _mkl_limit() -> Callable[[int], int]:
    """Sets the calling thread's MKL thread count (0 for none of its own) and returns the one before.

    After `torch.set_num_threads`, MKL no longer follows OpenMP. The builds of torch that carry MKL export its
    functions; elsewhere there is nothing to limit.
    """
    import torch

    for library in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        try:
            function = ctypes.CDLL(str(library)).MKL_Set_Num_Threads_Local
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
        return lambda count: int(function(count))
    return lambda count: 0
