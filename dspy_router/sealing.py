"""Checksums of saved states: what was damaged is told from what is sound."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dspy_router.encoders.base import shortened
from dspy_router.errors import RouteError

AFTER_DAMAGE = "Load another copy of the file, or save the program again."


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with a checksum of everything in it, which `require_intact` checks.

    The checksum, under `"sha256"`, is that of the state as compact JSON in UTF-8 with sorted keys.

    Raises:
        RouteError: If the state has no such form: a number that is not finite, a lone surrogate in a text.

    Example:
        >>> from dspy_router.sealing import sealed, require_intact
        >>> state = sealed({"name": "fruit", "sizes": [3, 64]})
        >>> state["sha256"][:8], require_intact(state)
        ('a1b5adcd', None)
        >>> require_intact({**state, "name": "fruits"})
        Traceback (most recent call last):
        dspy_router.errors.RouteError: The saved state is damaged: its checksum is 'a1b5adcd...
    """
    try:
        return {**state, "sha256": _checksum(state)}
    except (TypeError, ValueError, RecursionError) as error:
        raise RouteError(
            f"The state cannot be saved as JSON: {shortened(str(error), 200)}. Change the names or texts it is about."
        ) from error


def require_intact(state: Mapping[str, Any]) -> None:
    """Refuse a state that is not, value for value, what `sealed` made.

    Raises:
        RouteError: If it has no checksum, or another than its content.
    """
    found = state.get("sha256")
    try:
        checksum = _checksum({name: value for name, value in state.items() if name != "sha256"})
    except (TypeError, ValueError, RecursionError) as error:
        raise RouteError(f"The saved state is damaged: {shortened(str(error), 200)}. {AFTER_DAMAGE}") from error
    if not isinstance(found, str) or found != checksum:
        said = repr(shortened(found, 64)) if isinstance(found, str) else f"of type {type(found).__name__}"
        raise RouteError(
            f"The saved state is damaged: its checksum is {said}, its content has {checksum!r}. {AFTER_DAMAGE}"
        )


def _checksum(state: Mapping[str, Any]) -> str:
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
