"""A small MCP server over stdio: `python mcp_tool_server.py`."""

from typing import Annotated

from mcp.server import MCPServer
from pydantic import Field

server = MCPServer("kitchen")


@server.tool()
def set_timer(minutes: Annotated[int, Field(description="How long to wait.")], label: str = "") -> str:
    """Ring a bell
    after some minutes."""
    return f"{label or 'timer'}: {minutes} min"


@server.tool()
def convert_units(
    amount: Annotated[float, Field(description="How much of it there is.")],
    unit: Annotated[str, Field(description="The unit it is measured in, such as cups.")],
) -> str:
    """Convert between kitchen units."""
    return f"{amount} {unit}"


if __name__ == "__main__":
    server.run()
