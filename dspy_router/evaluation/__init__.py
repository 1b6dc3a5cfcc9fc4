"""Judging decisions: what a candidate would have earned on a log, tables and pictures.

The names below load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_router.evaluation.comparison import Comparison, compare

_HOMES = {"Comparison": "comparison", "compare": "comparison"}

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
