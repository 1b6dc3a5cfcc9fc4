"""How many threads torch uses for small work, without touching the user's torch settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

# Below this many multiplications a second intra-op thread gains nothing, and on busy cores it can cost forty times.
SMALL_WORK = 50_000_000


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """One intra-op thread inside the block if the work is small, else as many as the user has set.

    OpenMP's thread count belongs to the calling thread, so limiting it there changes nothing elsewhere.
    """
    if multiplications >= SMALL_WORK:
        yield
        return
    with _openmp().limit(limits=1):
        yield


@lru_cache(maxsize=1)
def _openmp() -> Any:
    import torch
    from threadpoolctl import ThreadpoolController

    torch.get_num_threads()  # has torch set up this thread's count before it is limited
    return ThreadpoolController().select(user_api="openmp")
