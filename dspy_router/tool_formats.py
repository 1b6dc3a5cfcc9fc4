"""Reading tools in the forms that other libraries give them: DSPy, MCP, LangChain and JSON schemas."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dspy

SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")  # OpenAI; Anthropic and MCP 2; MCP 1 and its JSON


@dataclass(frozen=True)
class ToolDescription:
    """What a tool says of itself.

    Attributes:
        name: Empty if it has none.
        description: On one line; may be empty.
        arguments: From an argument's name to what is said of it on one line, which may be empty.
    """

    name: str
    description: str
    arguments: Mapping[str, str]


def describe_tool(tool: Any) -> ToolDescription | None:
    """Read a tool.

    Args:
        tool: A `dspy.Tool`, an MCP `Tool` as a server lists it, a LangChain tool, a JSON schema of a function
            (`{"name": ..., "description": ..., "parameters": {...}}`, as it is or under `"function"`), or a callable.

    Returns:
        None if it is none of these.

    Example:
        >>> describe_tool({"name": "ring", "parameters": {"properties": {"bell": {"description": "Which one."}}}})
        ToolDescription(name='ring', description='', arguments={'bell': 'Which one.'})
    """
    if isinstance(tool, dspy.Tool):
        return _described(tool.name, tool.desc, tool.args)
    if isinstance(tool, Mapping):
        return _from_schema(tool)
    if inspect.isclass(tool):
        return describe_tool(dspy.Tool(tool))
    if hasattr(tool, "args_schema") and isinstance(getattr(tool, "args", None), Mapping):  # LangChain
        return _described(tool.name, tool.description, tool.args)
    for key in SCHEMA_KEYS[1:]:
        if isinstance(schema := getattr(tool, key, None), Mapping) and isinstance(getattr(tool, "name", None), str):
            return _described(tool.name, getattr(tool, "description", None), schema.get("properties"))
    return describe_tool(dspy.Tool(tool)) if callable(tool) else None


def one_line(text: str) -> str:
    """A docstring or description on one line."""
    return " ".join(inspect.cleandoc(text).split())


def _from_schema(tool: Mapping[str, Any]) -> ToolDescription | None:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    schemas = [function[key] for key in SCHEMA_KEYS if isinstance(function.get(key), Mapping)]
    return _described(function["name"], function.get("description"), schemas[0].get("properties") if schemas else None)


def _described(name: str | None, description: Any, properties: Any) -> ToolDescription:
    arguments = {}
    for argument, schema in properties.items() if isinstance(properties, Mapping) else ():
        said = schema.get("description") if isinstance(schema, Mapping) else None
        arguments[str(argument)] = one_line(said) if isinstance(said, str) else ""
    return ToolDescription(name or "", one_line(description) if isinstance(description, str) else "", arguments)
