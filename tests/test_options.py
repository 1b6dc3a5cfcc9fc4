from functools import partial

import dspy
import numpy as np
import pytest

from dspy_router import RouteError
from dspy_router.options import Option, encode_options, parse_tools


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
    assert parse_tools([dspy.Tool(lambda query: query, name="find")])[0].name == "find"
    assert parse_tools({"map": "Find the way."})[0].description == "Find the way."


def test_a_mapping_names_the_tools_in_it() -> None:
    tools = {
        "look_up": search,
        "find": dspy.Tool(search, desc="Find it."),
        "map": "Find the way.",
        "echo": lambda text: text,
        "ring": {"name": "bell", "description": "Ring it."},
    }
    assert [(option.name, option.value, option.description, option.arguments) for option in parse_tools(tools)] == [
        ("look_up", "look_up", "Find pages. On the web.", ("query", "limit")),
        ("find", "find", "Find it.", ("query", "limit")),
        ("map", "map", "Find the way.", ()),
        ("echo", "echo", "", ("text",)),
        ("ring", "ring", "Ring it.", ()),
    ]


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
        ({"a": 3}, r"\('a', 3\) is not a tool"),
        ({" ": "b"}, "name is empty"),
        ({"few": partial(search, limit=5)}, "no description"),
        ({3: search}, "3, .* is not a tool"),
        ([search, lambda query: query], "has no name of its own"),
        ([search, dspy.Tool(lambda query: query)], "has no name of its own"),
        ([search, partial(search, limit=5)], "has no name of its own"),
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


def test_descriptions_of_arguments_are_part_of_the_text() -> None:
    option = Option("ring", "Ring it", ("bell_name", "times"), argument_descriptions=("Which one.", ""))
    assert option.text == "ring: Ring it. Arguments: bell name: Which one.; times"
    assert option.texts == ("ring", "Ring it", option.text)


def test_an_option_that_is_only_a_name_has_its_vector_to_the_bit() -> None:
    vector = np.array([0.6, 0.8], np.float32)
    assert np.array_equal(encode_options([Option("card_arrival").texts], lambda texts: vector[None])[0], vector)


def test_an_options_vector_is_the_unit_mean_of_its_texts() -> None:
    vectors = {"a": [1, 0, 0], "b": [0, 1, 0], "a: b": [0, 0, 1], "c": [0, 1, 0]}
    encoded = encode_options([("a", "b", "a: b"), ("c",)], lambda texts: np.array([vectors[text] for text in texts]))
    np.testing.assert_allclose(encoded, [[3**-0.5] * 3, [0, 1, 0]], rtol=1e-6)
    # Texts that say nothing to an encoder stay without direction.
    assert not encode_options([("a", "b")], lambda texts: np.zeros((len(texts), 3))).any()
