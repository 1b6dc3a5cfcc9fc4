"""Beyond one process: rollouts and bulk routing on a Ray cluster (extra `ray`).

The names below load on first use.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.distributed.datasets import route_dataset
    from dspy_router.distributed.ray_executor import RayExecutor

_HOMES = {"RayExecutor": "ray_executor", "route_dataset": "datasets"}

__all__ = ["RayExecutor", "route_dataset"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
