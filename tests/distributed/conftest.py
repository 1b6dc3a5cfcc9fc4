"""One Ray cluster of worker processes for the tests that do not end it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Read when Ray is imported: no usage statistics, and no word about the machine's memory or /dev/shm.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1"}
CLUSTER = {
    "num_cpus": 2,
    "object_store_memory": 100_000_000,
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
    "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    import ray

    ray.init(**CLUSTER)
    yield ray
    ray.shutdown()
