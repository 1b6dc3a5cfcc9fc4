"""A voice assistant whose planner is one `dspy.Predict`, its tools, its data and its metric."""

import gzip
import json
from importlib import resources
from typing import Literal

import dspy


def add_to_playlist(request: str) -> str:
    """Add a song, album or artist to one of the user's playlists."""
    return "playlist changed"


def book_restaurant(request: str) -> str:
    """Book a table at a restaurant, bar or other place to eat, for a number of people at a time."""
    return "table booked"


def get_weather(request: str) -> str:
    """Tell the weather forecast for a place and time: temperature, rain, snow, wind, sun."""
    return "forecast told"


def play_music(request: str) -> str:
    """Play music: a song, an album, an artist, a genre, or a playlist from a streaming service."""
    return "music playing"


def rate_book(request: str) -> str:
    """Rate a book or novel with points or stars."""
    return "rating saved"


def search_creative_work(request: str) -> str:
    """Find a creative work by its title: a show, game, book, album, picture, trailer or soundtrack."""
    return "work shown"


def search_screening_event(request: str) -> str:
    """Find movie times and schedules: which films are showing at which cinema and when."""
    return "movie times shown"


TOOLS = [
    add_to_playlist,
    book_restaurant,
    get_weather,
    play_music,
    rate_book,
    search_creative_work,
    search_screening_event,
]
ToolName = Literal[
    "add_to_playlist",
    "book_restaurant",
    "get_weather",
    "play_music",
    "rate_book",
    "search_creative_work",
    "search_screening_event",
]


class PlanRequest(dspy.Signature):
    """Choose the tool that does what the user of a voice assistant asks for."""

    request: str = dspy.InputField()
    tool: ToolName = dspy.OutputField()


class VoiceAssistant(dspy.Module):
    """Plans with an LM, then runs the tool. What happened is all its users, and its metric, see."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = dspy.Predict(PlanRequest)

    def forward(self, request: str) -> dspy.Prediction:
        """Plan, run the tool, say what happened."""
        plan = self.planner(request=request)
        tool = next(tool for tool in TOOLS if tool.__name__ == plan.tool)
        return dspy.Prediction(outcome=tool(request), tool=plan.tool)


def outcome_reached(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """The program's metric: did happen what the user wanted? It never sees which tool is the right one."""
    return bool(prediction.outcome == example.outcome)


def requests(part: str) -> list[dspy.Example]:
    """SNIPS requests (`"train"`: 2,100, `"test"`: 700), each with the outcome its user wanted and no tool."""
    return [dspy.Example(request=text, outcome=_tool(name)(text)).with_inputs("request") for text, name in _rows(part)]


def labelled_requests(part: str) -> list[dspy.Example]:
    """The same requests with the right tool, for learning from labels."""
    return [dspy.Example(request=text, tool=_tool(name).__name__).with_inputs("request") for text, name in _rows(part)]


def _rows(part: str) -> list[tuple[str, str]]:
    data = (resources.files("dspy_router.demo") / "data" / f"{part}.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(data).decode().splitlines()]
    return [(row["text"], row["label"]) for row in rows]


def _tool(label: str):  # type: ignore[no-untyped-def]
    """The tool of a SNIPS label such as `AddToPlaylist`."""
    return next(tool for tool in TOOLS if tool.__name__.replace("_", "") == label.lower())
