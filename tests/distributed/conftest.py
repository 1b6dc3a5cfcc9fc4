"""A Ray cluster of worker processes on this machine, started once, and again after a test that ended it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no network
    "PYTHONPATH": str(ROOT),  # the tests' programs are imported in the workers
    "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",  # where /dev/shm is small
    "RAY_USAGE_STATS_ENABLED": "0",
}
CPUS = 3  # by Ray's count: two workers, and one for the reading and writing of datasets


@pytest.fixture(scope="package")
def _leave_in_the_end() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def cluster(_leave_in_the_end: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)
    import ray

    if not ray.is_initialized():
        ray.init(
            num_cpus=CPUS,
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    return ray
