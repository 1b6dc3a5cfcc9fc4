"""Packages whose names load on first use (PEP 562), so that importing them costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: Its `__name__`.
        homes: From each name to the module inside the package that has it.

    Example:
        >>> get, names = lazy_names("dspy_router", {"RouteError": "errors"})
        >>> get("RouteError").__name__, names()
        ('RouteError', ['RouteError'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(homes)
