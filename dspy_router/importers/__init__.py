"""From other people's logs to `Feedback` rows: tables, and MLflow's traces of an LM planner.

The names below load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_router.importers.mlflow_traces import read_mlflow_traces
    from dspy_router.importers.tables import read_table

_HOMES = {"read_mlflow_traces": "mlflow_traces", "read_table": "tables"}

__all__ = ["read_mlflow_traces", "read_table"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
