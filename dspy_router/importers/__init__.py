"""From other people's logs to `Feedback` rows: tables, and MLflow's traces of an LM planner.

The names below load on first use.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.importers.mlflow_traces import read_mlflow_traces
    from dspy_router.importers.tables import read_table

_HOMES = {"read_mlflow_traces": "mlflow_traces", "read_table": "tables"}

__all__ = ["read_mlflow_traces", "read_table"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
