import dspy
import pytest

from dspy_router import RouteError
from dspy_router.options import Option, parse_tools


def search(query: str, limit: int = 3) -> str:
    """Find pages.

    On the web.
    """
    return query


def test_every_form_of_tool_is_read() -> None:
    tools = [search, dspy.Tool(search, name="lookup", desc="Look up."), "mail", ("map", "Find the way.")]
    assert parse_tools(tools) == (
        Option("search", "Find pages. On the web.", ("query", "limit"), "search"),
        Option("lookup", "Look up.", ("query", "limit"), "lookup"),
        Option("mail", "", (), "mail"),
        Option("map", "Find the way.", (), "map"),
    )
    assert parse_tools({"map": "Find the way."})[0].description == "Find the way."


def test_a_callable_object_is_a_tool() -> None:
    class Ring:
        """Ring the bell."""

        def __call__(self, times: int) -> str:
            return "ding" * times

    option = parse_tools([Ring(), "other"])[0]
    assert (option.name, option.arguments) == ("Ring", ("times",))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "tools is empty"),
        ("search", "is one string"),
        (["a", "b", "a"], "two options named 'a'"),
        (["a", ""], "name is empty"),
        ([3, 4], "3 is not a tool"),
    ],
)
def test_unusable_tools_are_named(tools: list, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        parse_tools(tools)


def test_option_text_reads_as_words() -> None:
    assert Option("get_weather", "Tell the weather.", ("city_name",)).text == (
        "get weather: Tell the weather. Arguments: city name"
    )
    assert Option("GetWeather").text == "get weather"
    assert Option("a", "b", ("c",)).text == "a: b. Arguments: c"
