"""What can be chosen: options, and the forms in which a user may give them."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_router.errors import RouteError


@dataclass(frozen=True)
class Option:
    """One thing a decision can choose.

    Attributes:
        name: What the decision reports and what state files refer to. Unique within a field.
        description: What the head knows of the option before training; may be empty.
        arguments: Names of the tool's arguments, part of what the encoder reads.
        value: What the output field gets when this option is chosen.
        spoken: What the encoder reads in place of the name; the name in words by default.
    """

    name: str
    description: str = ""
    arguments: tuple[str, ...] = ()
    value: Any = None
    spoken: str | None = None

    @property
    def text(self) -> str:
        """The option as the encoder reads it: its name in words, its description, its arguments.

        Example:
            >>> Option("AddToPlaylist", "Put a song on a list.", ("playlist",)).text
            'add to playlist: Put a song on a list. Arguments: playlist'
        """
        parts = (words(self.name) if self.spoken is None else self.spoken, self.description)
        text = ": ".join(part for part in parts if part)
        if self.arguments:
            text += (
                f"{'' if text.endswith(('.', '!', '?')) else '.'} Arguments: {', '.join(map(words, self.arguments))}"
            )
        return text


def words(name: str) -> str:
    """An identifier as lower-case words.

    Example:
        >>> words("getWeather_v2"), words("HTTPGet"), words("card arrival")
        ('get weather v2', 'http get', 'card arrival')
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\s_\-./:]+", spaced)).strip().lower() or name


Tools = Iterable["dspy.Tool | Callable[..., Any] | str | tuple[str, str]"] | Mapping[str, str]


def parse_tools(tools: Tools) -> tuple[Option, ...]:
    """Read tools in any accepted form, in the order given.

    Args:
        tools: `dspy.Tool`s, callables (their docstring and arguments describe them), names,
            `(name, description)` pairs, or a mapping from name to description. Forms may be mixed.

    Raises:
        RouteError: If there are no tools, an entry has another form, or two share a name.

    Example:
        >>> [option.name for option in parse_tools({"search": "Look it up.", "calculator": "Do sums."})]
        ['search', 'calculator']
    """
    if isinstance(tools, str):
        raise RouteError(f"tools={tools!r} is one string; give a list such as tools=[{tools!r}, ...].")
    entries = list(tools.items()) if isinstance(tools, Mapping) else list(tools)
    if not entries:
        raise RouteError("tools is empty: give at least two tools to choose between.")
    options = tuple(_parse_tool(entry) for entry in entries)
    require_distinct(options, "tools")
    return options


def _parse_tool(entry: Any) -> Option:
    if isinstance(entry, str):
        if not entry.strip():
            raise RouteError(f"A tool's name is empty: {entry!r}. Give every tool a name.")
        return Option(entry, value=entry)
    if isinstance(entry, tuple) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return Option(entry[0], _one_line(entry[1]), value=entry[0])
    if isinstance(entry, dspy.Tool):
        name = entry.name or ""
        return Option(name, _one_line(entry.desc or ""), tuple(entry.args or ()), value=name)
    if callable(entry):
        return _parse_tool(dspy.Tool(entry))
    raise RouteError(
        f"{entry!r} is not a tool. Give a dspy.Tool, a callable, a name, a (name, description) pair, "
        "or a name-to-description dict."
    )


def _one_line(description: str) -> str:
    return " ".join(inspect.cleandoc(description).split())


def require_distinct(options: Iterable[Option], where: str) -> None:
    """Refuse two options with one name, since decisions and state files go by name."""
    seen: set[str] = set()
    for option in options:
        if option.name in seen:
            raise RouteError(f"{where} holds two options named {option.name!r}. Names must differ; rename one.")
        seen.add(option.name)
