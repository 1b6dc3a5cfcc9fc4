"""An agent's tools: which it takes, and what their schemas say of arguments."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dspy
from pydantic_core import to_jsonable_python

from dspy_router.errors import RouteError
from dspy_router.options import parse_tools

FINISH = "finish"
_REQUIRED = " (Required)"  # where DSPy's conversion of tools of MCP and LangChain notes it, and nowhere else


def read_tools(tools: Iterable[dspy.Tool | Callable[..., Any]]) -> dict[str, dspy.Tool]:
    """Tools by name, in the order given.

    Raises:
        RouteError: If one cannot be called or has no name, two share a name, one is named `finish`, or there is none.

    Example:
        >>> def search(query: str): "Look it up."
        >>> list(read_tools([search, dspy.Tool(len, name="count")]))
        ['search', 'count']
    """
    tools = list(tools)
    for tool in tools:
        if not isinstance(tool, dspy.Tool) and not callable(tool):
            raise RouteError(
                f"{tool!r} is no tool that an agent can call. Give dspy.Tools or callables; make one of an MCP tool "
                "with dspy.Tool.from_mcp_tool(session, tool), of a LangChain tool with dspy.Tool.from_langchain(tool)."
            )
    if not tools:
        raise RouteError("tools is empty: an agent needs one at least; without tools, use dspy.Predict.")
    parse_tools(tools)
    read = [tool if isinstance(tool, dspy.Tool) else dspy.Tool(tool) for tool in tools]
    found = {str(tool.name): tool for tool in read}
    if FINISH in found:
        raise RouteError(
            f"A tool is named {FINISH!r}, which is how an agent ends its run. Rename it: dspy.Tool(function, name=...)."
        )
    return found


def schema(tool: dspy.Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, as of one object.

    Example:
        >>> def search(query: str, pages: int = 1): "Look it up."
        >>> schema(dspy.Tool(search))["required"]
        ['query']
    """
    properties = dict(tool.args or {})
    if tool.has_kwargs and (tool.arg_desc or {}).keys() == properties.keys():  # of MCP or LangChain
        required = [name for name, text in (tool.arg_desc or {}).items() if text.endswith(_REQUIRED)]
    else:
        for name, parameter in inspect.signature(tool.func).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                properties.pop(name, None)
        required = [name for name, kind in properties.items() if "default" not in kind]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": tool.has_kwargs,
    }


def sole_argument(tool: dspy.Tool) -> str | None:
    """The tool's one required argument; None if it has none, or several."""
    required = schema(tool)["required"]
    return required[0] if len(required) == 1 else None


def takes_text(tool: dspy.Tool, argument: str) -> bool:
    """Whether any string will do for an argument; of one without a type that is taken to be so."""
    kind = schema(tool)["properties"][argument]
    return kind.get("type", "string") == "string" and not {"enum", "const", "anyOf", "oneOf", "allOf"} & kind.keys()


def refusal(tool: dspy.Tool, arguments: Any) -> str | None:
    """Why the schema of a tool refuses arguments; None if it takes them.

    Example:
        >>> def search(query: str): "Look it up."
        >>> refusal(dspy.Tool(search), {})
        "'query' is a required property"
    """
    if not isinstance(arguments, Mapping):
        return f"{arguments!r} is no JSON object"
    from jsonschema import ValidationError, validate

    try:
        validate(to_jsonable_python(dict(arguments), fallback=repr), schema(tool))
    except ValidationError as error:
        return str(error.message)
    return None


def is_async(tool: dspy.Tool) -> bool:
    """Whether calling the tool gives a coroutine."""
    return inspect.iscoroutinefunction(tool.func) or inspect.iscoroutinefunction(type(tool.func).__call__)


def require_sync(tools: Mapping[str, dspy.Tool], instead: str) -> None:
    """Refuse to run without an event loop where a tool is asynchronous, and DSPy may not wait for it.

    Args:
        tools: By name.
        instead: What to do.

    Raises:
        RouteError: If one is.
    """
    waiting = [name for name, tool in tools.items() if is_async(tool)]
    if waiting and not dspy.settings.allow_tool_async_sync_conversion:
        raise RouteError(
            f"The tools {waiting} are asynchronous: {instead}, or inside "
            "dspy.context(allow_tool_async_sync_conversion=True)."
        )
