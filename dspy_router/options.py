"""What can be chosen: options, what the encoder reads of them, and the forms in which a user may give them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import dspy

from dspy_router.errors import RouteError
from dspy_router.tool_formats import ToolDescription, describe_tool, one_line

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Option:
    """One thing a decision can choose.

    Attributes:
        name: What the decision reports and what state files refer to. Unique within a field.
        description: What the head knows of the option before training; may be empty.
        arguments: Names of the tool's arguments, part of what the encoder reads.
        value: What the output field gets when this option is chosen.
        spoken: What the encoder reads in place of the name; the name in words by default.
        argument_descriptions: What is said of each argument, in their order; empty if nothing is said of any.
    """

    name: str
    description: str = ""
    arguments: tuple[str, ...] = ()
    value: Any = None
    spoken: str | None = None
    argument_descriptions: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The option as the encoder reads it: its name in words, its description, its arguments.

        Example:
            >>> Option("AddToPlaylist", "Put a song on a list.", ("playlist",)).text
            'add to playlist: Put a song on a list. Arguments: playlist'
        """
        text = ": ".join(part for part in (self._name_in_words, self.description) if part)
        if self.arguments:
            names = [words(argument) for argument in self.arguments]
            said = self.argument_descriptions
            if said:
                names = [f"{name}: {about}" if about else name for name, about in zip(names, said, strict=True)]
            arguments = ("; " if said else ", ").join(names)
            text += f"{'' if text.endswith(('.', '!', '?')) else '.'} Arguments: {arguments}"
        return text

    @property
    def texts(self) -> tuple[str, ...]:
        """The different texts that stand for the option: its name in words, its description, all of it.

        Example:
            >>> Option("AddToPlaylist", "Put a song on a list.").texts
            ('add to playlist', 'Put a song on a list.', 'add to playlist: Put a song on a list.')
            >>> Option("card_arrival").texts
            ('card arrival',)
        """
        if self.spoken is not None:  # "yes" alone says nothing of what it answers
            return (self.text,)
        return tuple(dict.fromkeys(text for text in (self._name_in_words, self.description, self.text) if text))

    @property
    def _name_in_words(self) -> str:
        return words(self.name) if self.spoken is None else self.spoken


def encode_options(texts: Sequence[Sequence[str]], encode: "Callable[[list[str]], np.ndarray]") -> "np.ndarray":
    """Float32 [k, d]: for each option the mean of its texts' unit vectors, as a unit vector again.

    Name and description alone count beside the whole because a long list of arguments drowns them. With
    all-MiniLM-L6-v2 the mean finds the right function among a request's own in 89.6 % of the rows of the Berkeley
    Function-Calling Leaderboard's `live_multiple` (v4), the whole alone in 88.4 %.

    Args:
        texts: `Option.texts` of the k options.
        encode: From n texts to their unit vectors [n, d].

    Example:
        >>> import numpy as np
        >>> vectors = {"fig": [1.0, 0.0], "A fruit.": [0.0, 1.0]}
        >>> encode = lambda texts: np.array([vectors[text] for text in texts])
        >>> encode_options([("fig",), ("fig", "A fruit.")], encode).round(2)
        array([[1.  , 0.  ],
               [0.71, 0.71]], dtype=float32)
    """
    import numpy as np

    vectors = np.asarray(encode([text for of_option in texts for text in of_option]), np.float32)
    ends = np.cumsum([len(of_option) for of_option in texts])[:-1]
    return np.stack([_unit_mean(of_option) for of_option in np.split(vectors, ends)])


def _unit_mean(vectors: "np.ndarray") -> "np.ndarray":
    if len(vectors) == 1:
        return vectors[0]
    mean = vectors.mean(axis=0)
    length = (mean @ mean) ** 0.5
    return mean / length if length > 0 else mean


def words(name: str) -> str:
    """An identifier as lower-case words.

    Example:
        >>> words("getWeather_v2"), words("HTTPGet"), words("card arrival")
        ('get weather v2', 'http get', 'card arrival')
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\s_\-./:]+", spaced)).strip().lower() or name


# What `describe_tool` reads, names and pairs. The types of MCP and LangChain are not named: neither is a dependency.
Tools = Iterable["dspy.Tool | Callable[..., Any] | Mapping[str, Any] | str | tuple[str, str] | Any"] | Mapping[str, Any]


def parse_tools(tools: Tools) -> tuple[Option, ...]:
    """Read tools in any accepted form, in the order given.

    Args:
        tools: `dspy.Tool`s, callables (their docstring and arguments describe them), tools of MCP and LangChain,
            JSON schemas of functions, names, `(name, description)` pairs, or a mapping from name to description or
            tool; a tool then goes by that name. Forms may be mixed.

    Raises:
        RouteError: If there are no tools, an entry has another form or, as a lambda, no name, or two share a name.

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
    name, tool = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
    if isinstance(name, str) and isinstance(tool, str):
        described: ToolDescription | None = ToolDescription(name, one_line(tool), {})
    else:
        described = describe_tool(tool)
    if described is None or not isinstance(name, str | None):
        raise RouteError(
            f"{entry!r} is not a tool. Give a dspy.Tool, a callable, a tool of MCP or LangChain, a JSON schema with a "
            "name, a name, a (name, description) pair, or a dict from name to description or tool."
        )
    name = described.name if name is None else name
    if not name.strip():
        raise RouteError(f"A tool's name is empty: {entry!r}. Give every tool a name.")
    if isinstance(tool, partial) or (entry is tool and name == "<lambda>"):
        raise RouteError(
            f"{entry!r} has no name of its own to decide by, or no description. Give a function made with def, or "
            'dspy.Tool(function, name="search", desc="Look it up.").'
        )
    said = tuple(described.arguments.values())
    return Option(
        name,
        described.description,
        tuple(described.arguments),
        name,
        argument_descriptions=said if any(said) else (),
    )


def require_distinct(options: Iterable[Option], where: str) -> None:
    """Refuse two options with one name, since decisions and state files go by name."""
    seen: set[str] = set()
    for option in options:
        if option.name in seen:
            raise RouteError(f"{where} holds two options named {option.name!r}. Names must differ; rename one.")
        seen.add(option.name)
