"""The program of the matrix: a route chooses a tool by name, three LM predictors do the rest."""

import random
from collections.abc import Callable
from typing import Any

import dspy

PLACES = {"oslo": ("rain", "six", "platform-two"), "lima": ("fog", "noon", "platform-nine")}
NOWHERE = "no such place"


def weather(place: str) -> str:
    """The weather forecast for a place."""
    return PLACES[place][0] if place in PLACES else NOWHERE


def clock(place: str) -> str:
    """The local time of a place."""
    return PLACES[place][1] if place in PLACES else NOWHERE


def trains(place: str) -> str:
    """From where the next train to a place leaves."""
    return PLACES[place][2] if place in PLACES else NOWHERE


TOOLS = {tool.__name__: tool for tool in (weather, clock, trains)}
# The words by which a request gives its tool away; no description says them, so they must be learned.
HINTS = {"weather": ("umbrella", "sunscreen"), "clock": ("early", "late"), "trains": ("depart", "luggage")}


class Concierge(dspy.Module):
    """Reads a request, calls the chosen tool and words what it found.

    `choose` is a route, or any callable that takes a request and returns a prediction with a tool's name.
    """

    def __init__(self, choose: Callable[..., Any]) -> None:
        super().__init__()
        # The signatures are made here, because `InferRules` changes those of the student for good.
        hurry = dspy.Signature("request -> urgent: bool").with_updated_fields("urgent", desc="Is the guest in a hurry?")
        self.choose = choose
        self.locate = dspy.Predict("request -> place")
        self.hurry = dspy.Predict(hurry)
        self.word = dspy.ChainOfThought("request, finding -> reply")
        self.tools = TOOLS

    def forward(self, request: str) -> dspy.Prediction:
        tool = self.choose(request=request).tool
        place = self.locate(request=request).place
        urgent = self.hurry(request=request).urgent
        finding = self.tools[tool](place)
        reply = self.word(request=request, finding=finding).reply
        return dspy.Prediction(tool=tool, place=place, urgent=urgent, reply=reply)


def choose_by_hint(request: str) -> dspy.Prediction:
    """The plain function that decides what the trained route decides."""
    return dspy.Prediction(tool=next(tool for tool, hints in HINTS.items() if set(hints) & set(request.split())))


def guests(count: int, *, seed: int = 0) -> list[dspy.Example]:
    """Requests with the right answer to every step; half are in a hurry, half polite, as an LM without advice needs."""
    random_ = random.Random(seed)
    examples = []
    for number in range(count):
        tool = list(TOOLS)[number % len(TOOLS)]
        place, urgent, polite = random_.choice(list(PLACES)), number % 4 < 2, number % 2
        said = [random_.choice(HINTS[tool]), place, "quickly" if urgent else "someday", "please" if polite else "now"]
        fields = {"request": " ".join(said), "tool": tool, "place": place, "urgent": urgent}
        example = dspy.Example(**fields, reply=f"It is {TOOLS[tool](place)}.")
        examples.append(example.with_inputs("request"))
    return examples


def share_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> float:
    """The share of a run's three LM answers that are right; the reply is wrong where the tool is."""
    fields = ("place", "urgent", "reply")
    return sum(prediction[field] == example[field] for field in fields) / len(fields)


def all_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return share_right(example, prediction) == 1.0


def share_right_with_feedback(
    example: dspy.Example,
    prediction: dspy.Prediction,
    trace: object = None,
    name: str | None = None,
    own_trace: object = None,
) -> dspy.Prediction:
    """The same as GEPA takes it."""
    return dspy.Prediction(score=share_right(example, prediction), feedback=f"Right was: {example.reply}")


def sounds_right(inputs: dict[str, Any], prediction: dspy.Prediction) -> float:
    """A reward that needs no label, for `Refine` and `BestOfN`."""
    return float(prediction.place in PLACES and prediction.reply.startswith("It is"))
