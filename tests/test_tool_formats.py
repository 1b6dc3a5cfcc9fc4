import asyncio
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
from langchain_core.tools import tool as langchain_tool
from mcp import Client, StdioServerParameters
from pydantic import BaseModel

from dspy_router import DifferentiableRoute, RouteError
from dspy_router.options import Option, parse_tools
from dspy_router.tool_formats import describe_tool

SERVER = StdioServerParameters(command=sys.executable, args=[str(Path(__file__).with_name("mcp_tool_server.py"))])
KITCHEN = (
    Option(
        "set_timer",
        "Ring a bell after some minutes.",
        ("minutes", "label"),
        "set_timer",
        argument_descriptions=("How long to wait.", ""),
    ),
    Option(
        "convert_units",
        "Convert between kitchen units.",
        ("amount", "unit"),
        "convert_units",
        argument_descriptions=("How much of it there is.", "The unit it is measured in, such as cups."),
    ),
)
SCHEMA: dict[str, Any] = {
    "name": "set_timer",
    "description": "Ring a bell\n  after some minutes.",
    "parameters": {
        "type": "object",
        "properties": {
            "minutes": {"type": "integer", "description": "How long to wait."},
            "label": {"type": "string"},
        },
        "required": ["minutes"],
    },
}


def letters(texts: list[str]) -> list[list[float]]:
    return [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_tools_of_an_mcp_server_are_read_routed_and_called() -> None:
    async def run() -> tuple[Any, ...]:
        async with Client(SERVER) as client:
            listed = (await client.list_tools()).tools
            tools = [dspy.Tool.from_mcp_tool(client, tool) for tool in listed]
            route = DifferentiableRoute("request -> tool", tools=tools, encoder=letters)
            chosen = (await route.acall(request="convert between kitchen units")).tool
            answer = await next(tool for tool in tools if tool.name == chosen).acall(amount=2, unit="cups")
            return listed, tools, chosen, answer

    listed, tools, chosen, answer = asyncio.run(asyncio.wait_for(run(), 30))
    assert parse_tools(tools) == KITCHEN
    assert parse_tools(listed) == KITCHEN
    assert (chosen, answer) == ("convert_units", "2.0 cups")


def test_langchain_tools_are_read_with_and_without_dspy() -> None:
    @langchain_tool(parse_docstring=True)
    def set_timer(minutes: int, label: str = "") -> str:
        """Ring a bell after some minutes.

        Args:
            minutes: How long to wait.
            label: What it is for.
        """
        return f"{label}: {minutes}"

    expected = Option(
        "set_timer",
        "Ring a bell after some minutes.",
        ("minutes", "label"),
        "set_timer",
        argument_descriptions=("How long to wait.", "What it is for."),
    )
    assert parse_tools([dspy.Tool.from_langchain(set_timer), "other"])[0] == expected
    assert parse_tools([set_timer, "other"])[0] == expected


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        {"type": "function", "function": SCHEMA},
        {"name": SCHEMA["name"], "description": SCHEMA["description"], "input_schema": SCHEMA["parameters"]},
        {"name": SCHEMA["name"], "description": SCHEMA["description"], "inputSchema": SCHEMA["parameters"]},
    ],
    ids=["function", "OpenAI tool", "Anthropic", "MCP"],
)
def test_json_schemas_of_every_dialect_are_read(schema: dict[str, Any]) -> None:
    assert parse_tools([schema, "other"])[0] == KITCHEN[0]


def test_what_a_schema_leaves_out_is_empty() -> None:
    assert parse_tools([{"name": "ring"}, {"name": "stop", "description": None, "parameters": None}]) == (
        Option("ring", value="ring"),
        Option("stop", value="stop"),
    )


def test_an_argument_of_a_dspy_tool_may_be_described() -> None:
    def ring(bell: str, times: int) -> None:
        """Ring it."""

    described = describe_tool(dspy.Tool(ring, arg_desc={"bell": "Which one."}))
    assert described is not None
    assert described.arguments == {"bell": "Which one.", "times": ""}


def test_a_class_is_read_as_the_callable_it_is() -> None:
    class Ring(BaseModel):
        """Ring a bell."""

        times: int = 1

    described = describe_tool(Ring)
    assert described is not None
    assert (described.name, described.description) == ("Ring", "Ring a bell.")


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"description": "nameless"}, "is not a tool"),
        ({"name": 3}, "is not a tool"),
        ({"function": "ring"}, "is not a tool"),
        ({"name": " "}, "name is empty"),
    ],
)
def test_a_schema_without_a_usable_name_is_quoted(tool: dict[str, Any], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        parse_tools([tool, "other"])
