"""Judging decisions: what a candidate would have earned on a log, tables and pictures.

The names below load on first use.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.evaluation.comparison import Comparison, compare

_HOMES = {"Comparison": "comparison", "compare": "comparison"}

__all__ = ["Comparison", "compare"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
